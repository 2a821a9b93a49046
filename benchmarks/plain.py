"""Siamese DETR's pre-training step with the structure of the research code, to compare ours with.

Written anew from the method's description, in the plainest way: the frozen backbone runs with its batch norms as
separate operations, once for each view and once for each view's crops; encoder and decoder run once per direction;
RoIAlign cuts 49 bins per region; every head runs on every query of every layer; each layer is matched on its own, with
its own copies to the host, and its losses are computed image by image; every logged term is read; AdamW updates one
tensor after the other. Weights, inputs and mathematics are those of :class:`siamese_detr.pretext.SiamesePretext`, with
``pool_padding`` (as in the research code, which averages padding, too) or without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou, roi_align

from siamese_detr.detectors.functional import full_precision
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.views.batch import ViewInputs

Timer = Callable[[str], Any]


class PlainSiamese:
    """The plain step.

    Args:
        pretext: holds the weights, and the configuration (the paper's; ``pool_padding`` may be off).
        timer: context manager by part, see :mod:`step`.
    """

    def __init__(self, pretext: SiamesePretext, timer: Timer) -> None:
        self.pretext, self.detector, self.timer = pretext, pretext.detector, timer
        if pretext.config.discrimination != "both":
            raise ValueError("the plain step is written for the paper's losses")

    def optimizer(self, lr: float = 1e-4, weight_decay: float = 1e-4) -> torch.optim.Optimizer:
        """AdamW, one tensor after the other."""
        parameters = [parameter for parameter in self.pretext.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, foreach=False, fused=False)

    @torch.no_grad()
    def backbone(self, inputs: ViewInputs) -> tuple[list[list[Tensor]], list[Tensor]]:
        """Maps of each view, and features (B, P, C) of each view's crops."""
        assert inputs.crops is not None
        views = len(inputs.boxes)
        with self.timer("backbone, views"):
            pixels, masks = inputs.pixel_values.chunk(views), inputs.pixel_mask.chunk(views)
            maps = [self.detector.features(x, mask) for x, mask in zip(pixels, masks, strict=True)]
        with self.timer("backbone, crops"):
            crops = []
            for x in inputs.crops.chunk(views):
                levels = self.detector.features(x, x.new_ones(len(x), *x.shape[-2:], dtype=torch.bool))
                pooled = torch.cat([full_precision(level).mean((2, 3)) for level in levels], 1)
                crops.append(pooled.unflatten(0, inputs.boxes.shape[1:3]))
        return maps, crops

    def losses(self, inputs: ViewInputs, maps: list[list[Tensor]], crops: list[Tensor]) -> tuple[Tensor, dict]:
        """The total loss and its logged terms, by the names of ours."""
        detector, timer = self.detector, self.timer
        masks = inputs.pixel_mask.chunk(2)
        with timer("Transformer"):
            sizes = inputs.sizes.unflatten(0, (2, -1))
            sides = sizes.tolist()
            queries = [self.queries(maps[v], inputs.query_boxes[v], sides[v]) for v in range(2)]
            memories = [detector.encode(maps[v], masks[v]) for v in range(2)]
            decoded = [detector.decode(memories[v], queries[1 - v]) for v in range(2)]
        with timer("heads, matching, losses"):
            terms: dict[str, Tensor] = {}
            for v in range(2):  # the memory of view v, the regions of the other one
                for name, value in self.direction(decoded[v], inputs.boxes[v], sizes[v], crops[1 - v]).items():
                    terms[name] = terms.get(name, 0) + 0.5 * value
            terms["loss_global"] = self.global_loss([self.pooled(memory) for memory in memories])
            config = self.pretext.config
            weights = {
                "loss_class": config.class_weight,
                "loss_box": config.box_weight,
                "loss_giou": config.giou_weight,
                "loss_region": config.lambda_region,
                "loss_global": config.lambda_global,
            }
            total = sum(weights["_".join(name.split("_")[:2])] * term for name, term in terms.items())
            logged = {name: term.item() for name, term in terms.items()}
        assert isinstance(total, Tensor)
        return total, logged

    def queries(self, maps: list[Tensor], boxes: Tensor, sizes: list[list[int]]) -> Tensor:
        """Region queries (B, Q, D) of images of these heights and widths."""
        pooled = []
        for level, stride in zip(maps, self.detector.strides, strict=True):
            regions = list(boxes.to(level.dtype))
            if self.pretext.config.pool_padding:
                bins = roi_align(level, regions, 7, 1 / stride)
            else:
                shown = [x[:, : -(-h // stride), : -(-w // stride)] for x, (h, w) in zip(level, sizes, strict=True)]
                pairs = zip(shown, regions, strict=True)
                bins = torch.cat([roi_align(x[None], [region], 7, 1 / stride) for x, region in pairs])
            pooled.append(bins.mean((2, 3)).unflatten(0, boxes.shape[:2]))
        embedded = self.pretext.region_embedding(torch.cat(pooled, -1))
        return embedded.repeat_interleave(self.detector.num_queries // boxes.shape[1], 1)

    def direction(self, decoded: Any, boxes: Tensor, sizes: Tensor, crops: Tensor) -> dict[str, Tensor]:
        """The losses of every layer of one direction."""
        assert self.pretext.region_head is not None
        logits = self.pretext.class_head(decoded.states)
        features = self.pretext.region_head(decoded.states)  # of all queries
        scale = sizes.flip(1).repeat(1, 2)[:, None]
        targets = [
            {"boxes": x, "features": y}
            for x, y in zip(box_convert(boxes, "xyxy", "cxcywh") / scale, crops, strict=True)
        ]
        terms = {}
        last = len(logits) - 1
        for layer in range(len(logits)):
            values = self.layer_losses(logits[layer], decoded.boxes[layer], features[layer], targets)
            terms |= {name if layer == last else f"{name}_{layer}": value for name, value in values.items()}
        return terms

    @torch.no_grad()
    def match(self, logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Queries and targets matched in every image of one layer."""
        wanted = torch.cat([target["boxes"] for target in targets])
        answer = logits.flatten(0, 1).softmax(-1)[:, 1:2]
        flat = boxes.flatten(0, 1)
        corners = box_convert(flat, "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
        cost = 5 * torch.cdist(flat, wanted, p=1) - answer - 2 * generalized_box_iou(*corners)
        split = cost.view(*boxes.shape[:2], -1).cpu().split([len(target["boxes"]) for target in targets], -1)
        pairs = [linear_sum_assignment(one[image]) for image, one in enumerate(split)]
        return [(torch.as_tensor(i, device=flat.device), torch.as_tensor(j, device=flat.device)) for i, j in pairs]

    def layer_losses(
        self, logits: Tensor, boxes: Tensor, features: Tensor, targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The losses of one layer."""
        pairs = self.match(logits, boxes, targets)
        count = max(torch.as_tensor([float(sum(len(target["boxes"]) for target in targets))]).item(), 1)
        image = torch.cat([torch.full_like(query, n) for n, (query, _) in enumerate(pairs)])
        query = torch.cat([query for query, _ in pairs])
        wanted = torch.cat([target["boxes"][j] for target, (_, j) in zip(targets, pairs, strict=True)])
        aims = torch.cat([target["features"][j] for target, (_, j) in zip(targets, pairs, strict=True)])
        classes = torch.full(logits.shape[:2], 2, dtype=torch.int64, device=logits.device)
        classes[image, query] = 1
        weight = logits.new_tensor([1, 1, self.pretext.config.no_object_weight])
        found = boxes[image, query]
        overlap = generalized_box_iou(
            box_convert(found, "cxcywh", "xyxy"), box_convert(wanted.to(found.dtype), "cxcywh", "xyxy")
        )
        said = F.normalize(features, dim=-1)[image, query]
        distance = F.mse_loss(said, F.normalize(aims.to(said.dtype), dim=-1), reduction="none")
        return {
            "loss_class": F.cross_entropy(logits.transpose(1, 2), classes, weight),
            "loss_box": F.l1_loss(found, wanted.to(found.dtype), reduction="none").sum() / count,
            "loss_giou": (1 - overlap.diag()).sum() / count,
            "loss_region": distance.sum() / count,
        }

    def pooled(self, memory: Any) -> Tensor:
        """Mean of every level of the memory: (B, D * levels)."""
        if not self.pretext.config.pool_padding:
            return memory.pooled()
        levels = memory.tokens.split([height * width for height, width in memory.shapes], 1)
        return torch.cat([level.mean(1) for level in levels], -1)

    def global_loss(self, pooled: list[Tensor]) -> Tensor:
        """Global discrimination, one view after the other."""
        head = self.pretext.global_head
        assert head is not None
        projections = [head.projector(x) for x in pooled]
        predictions = [head.predictor(x) for x in projections]
        apart = [2 - 2 * F.cosine_similarity(predictions[v], projections[1 - v].detach(), dim=-1) for v in range(2)]
        return (apart[0].mean() + apart[1].mean()) / 2

    def update(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float = 0.1) -> None:
        """Backward pass, clipping and AdamW."""
        with self.timer("backward"):
            optimizer.zero_grad()
            loss.backward()
        with self.timer("clip, optimiser"):
            parameters = [parameter for parameter in self.pretext.parameters() if parameter.requires_grad]
            nn.utils.clip_grad_norm_(parameters, clip, foreach=False)
            optimizer.step()
