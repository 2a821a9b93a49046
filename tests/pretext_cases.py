"""Small detectors and batches for the tests of the pretext tasks, and the slow, obvious computation of their losses."""

from __future__ import annotations

import dataclasses
import itertools

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou
from transformers import ResNetConfig

from siamese_detr.detectors.adapter import Decoded, DetectorAdapter
from siamese_detr.detectors.build import build_detector
from siamese_detr.pretext.base import Pretext
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.views.batch import ViewInputs

CHANNELS = 16


def small_detector(
    family: str = "conditional-detr", queries: int = 12, seed: int = 0, **sizes: object
) -> DetectorAdapter:
    """Two encoder and two decoder layers of width 32 without dropout, behind a random ResNet."""
    backbone = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8, 12, CHANNELS],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    layers = {"encoder_layers": 2, "decoder_layers": 2, "ffn_size": 32}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    shape = {"num_queries": queries, "hidden_size": 32, "heads": 4}
    return build_detector(family, backbone, seed=seed, **(shape | layers | dropout | sizes))


def randomise(pretext: Pretext, seed: int = 1) -> Pretext:
    """Move all learned parameters off their initial values (box heads start at zero), in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pretext.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return pretext.double().train()


def random_boxes(size: tuple[int, int], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Boxes xyxy, each side at least a quarter of the picture of ``size`` (height, width)."""
    scale = torch.tensor([size[1], size[0]], dtype=torch.float64)
    low = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.5
    high = low + 0.25 + torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.25
    return torch.cat([low * scale, high * scale], -1)


def random_features(
    views: int = 2, batch: int = 3, regions: int = 4, seed: int = 0, detector: DetectorAdapter | None = None
) -> FrozenFeatures:
    """Random maps of pictures of different sizes, padded to 128 × 160; at stride 32 if no detector says otherwise."""
    levels = [(CHANNELS, 32)] if detector is None else list(zip(detector.channels, detector.strides, strict=True))
    generator = torch.Generator().manual_seed(seed)
    sizes = [(128, 160), (96, 128), (128, 96), (64, 160)][:batch]
    valid = torch.tensor(sizes).repeat(views, 1)
    boxes = torch.stack([random_boxes(size, (views, regions), generator) for size in sizes], 1)
    mask = (torch.arange(128)[:, None] < valid[:, 0, None, None]) & (torch.arange(160) < valid[:, 1, None, None])
    return FrozenFeatures(
        maps=[
            torch.randn(views * batch, channels, 128 // stride, 160 // stride, generator=generator, dtype=torch.float64)
            for channels, stride in levels
        ],
        pixel_mask=mask,
        sizes=valid,
        boxes=boxes,
        query_boxes=boxes * (0.9 + 0.1 * torch.rand(boxes.shape, generator=generator, dtype=torch.float64)),
        crop_features=torch.randn(
            views, batch, regions, sum(channels for channels, _ in levels), generator=generator, dtype=torch.float64
        ),
    )


def random_inputs(views: int = 2, batch: int = 2, regions: int = 3, seed: int = 0, crops: bool = True) -> ViewInputs:
    """A prepared batch of noise, 64 × 96 pixels."""
    generator = torch.Generator().manual_seed(seed)
    boxes = random_boxes((64, 96), (views, batch, regions), generator).float()
    return ViewInputs(
        pixel_values=torch.randn(views * batch, 3, 64, 96, generator=generator),
        pixel_mask=torch.ones(views * batch, 64, 96, dtype=torch.bool),
        sizes=torch.tensor([[64, 96]]).repeat(views * batch, 1),
        boxes=boxes,
        query_boxes=boxes,
        crops=torch.randn(views * batch * regions, 3, 32, 32, generator=generator) if crops else None,
    )


def take_images(features: FrozenFeatures, images: Tensor) -> FrozenFeatures:
    """The features of some images of the batch, in that order."""
    views, batch = features.boxes.shape[:2]

    def flat(x: Tensor) -> Tensor:
        return x.unflatten(0, (views, batch))[:, images].flatten(0, 1)

    return FrozenFeatures(
        maps=[flat(level) for level in features.maps],
        pixel_mask=flat(features.pixel_mask),
        sizes=flat(features.sizes),
        boxes=features.boxes[:, images],
        query_boxes=features.query_boxes[:, images],
        crop_features=None if features.crop_features is None else features.crop_features[:, images],
    )


def swap_views(features: FrozenFeatures) -> FrozenFeatures:
    """The same image pairs, the other view first."""
    views, batch = features.boxes.shape[:2]

    def flat(x: Tensor) -> Tensor:
        return x.unflatten(0, (views, batch)).flip(0).flatten(0, 1)

    return FrozenFeatures(
        maps=[flat(level) for level in features.maps],
        pixel_mask=flat(features.pixel_mask),
        sizes=flat(features.sizes),
        boxes=features.boxes.flip(0),
        query_boxes=features.query_boxes.flip(0),
        crop_features=None if features.crop_features is None else features.crop_features.flip(0),
    )


def pad_more(features: FrozenFeatures, rows: int, columns: int, seed: int = 3) -> FrozenFeatures:
    """The same features in a larger padded frame: more cells (of 32 pixels) of junk, which no mask covers."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for level in features.maps:
        images, channels, height, width = level.shape
        junk = 10 * torch.randn(
            images, channels, height + rows, width + columns, generator=generator, dtype=level.dtype
        )
        junk[:, :, :height, :width] = level
        maps.append(junk)
    mask = F.pad(features.pixel_mask, (0, 32 * columns, 0, 32 * rows))
    return dataclasses.replace(features, maps=maps, pixel_mask=mask)


def fill_padding(features: FrozenFeatures, value: float) -> FrozenFeatures:
    """The same features with another value in the cells without picture."""
    outside = ~features.pixel_mask[:, ::32, ::32].unsqueeze(1)
    return dataclasses.replace(features, maps=[level.masked_fill(outside, value) for level in features.maps])


class Recorder:
    """Keeps what a detector's ``decode`` was given and gave."""

    def __init__(self, detector: DetectorAdapter) -> None:
        self.decode = detector.decode
        self.decoded: list[Decoded] = []
        self.masks: list[Tensor | None] = []
        self.queries: list[Tensor | None] = []
        detector.decode = self  # type: ignore[assignment,method-assign]

    def __call__(self, memory, region_queries=None, query_mask=None):
        decoded = self.decode(memory, region_queries, query_mask)
        for tensor in (decoded.states, decoded.boxes):
            if tensor.requires_grad:
                tensor.retain_grad()
        self.decoded.append(decoded)
        self.masks.append(query_mask)
        self.queries.append(region_queries)
        return decoded


def slow_losses(logits: Tensor, boxes: Tensor, targets: Tensor, valid: Tensor) -> tuple[dict[str, float], list]:
    """L_cls, L_box and L_giou of one direction and layer, image by image, and the (image, query, region) triples.

    Args:
        logits: (B, Q, 3). boxes: (B, Q, 4) cxcywh. targets: (B, P, 4) cxcywh. valid: (B, P).
    """
    triples = []
    distance = apart = 0.0
    for image, (scores, answers, goals, real) in enumerate(zip(logits, boxes, targets, valid, strict=True)):
        rows = real.nonzero().flatten()
        probability = scores.softmax(-1)[:, 1]
        goals_xyxy, answers_xyxy = (box_convert(x, "cxcywh", "xyxy") for x in (goals[rows], answers))
        overlap = generalized_box_iou(answers_xyxy, goals_xyxy)
        cost = -probability[:, None] + 5 * torch.cdist(answers, goals[rows], p=1) - 2 * overlap
        for query, column in zip(*linear_sum_assignment(cost.detach().numpy()), strict=True):
            triples.append((image, int(query), int(rows[column])))
            distance += (answers[query] - goals[rows[column]]).abs().sum().item()
            apart += 1 - overlap[query, column].item()
    labels = torch.full(logits.shape[:2], 2)
    for image, query, _ in triples:
        labels[image, query] = 1
    weight = torch.tensor([1, 1, 0.1], dtype=logits.dtype)
    label = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight).item()
    return {"loss_class": label, "loss_box": distance / len(triples), "loss_giou": apart / len(triples)}, triples


def slow_pretext_terms(pretext: Pretext, decoded: Decoded, features: FrozenFeatures) -> tuple[dict, dict]:
    """Detection terms (name, layer) averaged over directions, and the triples of every (layer, direction)."""
    views, batch, _, _ = features.boxes.shape
    terms: dict[tuple[str, int], float] = {}
    triples = {}
    layers = len(decoded.states)
    for layer, view in itertools.product(range(layers), range(views)):
        span = slice(view * batch, (view + 1) * batch)
        boxes, states = decoded.boxes[layer, span], decoded.states[layer, span]
        height, width = features.sizes[span].double().unbind(-1)
        scale = torch.stack([width, height, width, height], -1)[:, None]
        targets = box_convert(features.boxes[view] / scale, "xyxy", "cxcywh")
        valid = (features.boxes[view, ..., 2:] > features.boxes[view, ..., :2]).all(-1)
        found, triples[layer, view] = slow_losses(pretext.class_head(states), boxes, targets, valid)
        for name, value in found.items():
            terms[name, layer] = terms.get((name, layer), 0.0) + value / views
    return terms, triples


def slow_distance(a: Tensor, b: Tensor) -> float:
    """Squared distance of two vectors, both normalised."""
    return ((a / a.norm() - b / b.norm()) ** 2).sum().item()


def term_name(name: str, layer: int, layers: int = 2) -> str:
    """The name under which a layer's term is reported."""
    return name if layer == layers - 1 else f"{name}_{layer}"
