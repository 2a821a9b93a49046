"""One tiny detector of every family, of random weights, for the suite all of them share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LwDetrViTConfig, PretrainedConfig, ResNetConfig, RfDetrDinov2Config

from siamese_detr.detectors import DetectorAdapter, build_detector
from siamese_detr.detectors.structures import Targets

QUERIES, WIDTH = 12, 32
CASES = {
    "detr": ("detr", {}),
    "conditional-detr": ("conditional-detr", {}),
    "deformable-detr": ("deformable-detr", {}),
    "deformable-detr-one-scale": ("deformable-detr", {"num_feature_levels": 1}),
    "deformable-detr-refined": ("deformable-detr", {"with_box_refine": True}),
    "dab-detr": ("dab-detr", {}),
    "rt-detr": ("rt-detr", {}),
    "rt-detr-v2": ("rt-detr-v2", {}),
    "d-fine": ("d-fine", {}),
    "deimv2": ("deimv2", {}),
    "lw-detr": ("lw-detr", {}),
    "rf-detr": ("rf-detr", {}),
}
UNMASKED = ("rt-detr", "rt-detr-v2", "d-fine", "deimv2", "lw-detr", "rf-detr")
"""Families whose encoder or projector knows no padding mask: the adapters empty the padding, stock models do not."""
every_detector = pytest.mark.parametrize("case", CASES)

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_convolution_pointwise"), reason="this build of PyTorch lacks oneDNN"
)


def tiny_backbone(family: str = "") -> PretrainedConfig:
    """A ResNet, or the ViT that alone fits the family."""
    vit: dict[str, Any] = dict(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, out_features=["stage2", "stage4"], num_windows=4
    )
    if family == "lw-detr":
        return LwDetrViTConfig(**vit, window_block_indices=[0, 2], pretrain_image_size=64, image_size=64, patch_size=16)
    if family == "rf-detr":
        return RfDetrDinov2Config(**{**vit, "num_windows": 2}, image_size=56, patch_size=14)
    return ResNetConfig(embedding_size=4, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic")


def fitting_side(detector: DetectorAdapter) -> int:
    """Side, at least 128, of a square the detector takes without padding it."""
    return -(-128 // (detector.square_side or 1)) * (detector.square_side or 1)


def tiny_detector(
    case: str, *, classes: int = 3, dropout: float = 0.0, reduced: bool = True, **changes: object
) -> DetectorAdapter:
    """A detector with 2 + 2 layers of width 32, its vectors moved off their initial constants.

    Args:
        case: of `CASES`.
        classes, dropout: of the detector.
        reduced: as pre-training has it, without queries that only fine-tuning trains.
        changes: to its sizes and options.
    """
    family, options = CASES[case]
    sizes: dict[str, object] = dict(
        num_queries=QUERIES,
        hidden_size=WIDTH,
        heads=4,
        encoder_layers=2,
        decoder_layers=2,
        ffn_size=40,
        num_labels=classes,
        dropout=dropout,
        attention_dropout=dropout,
        activation_dropout=dropout,
        seed=0,
    )
    detector = build_detector(family, tiny_backbone(family), **{**sizes, **options, **changes})
    if reduced:
        detector.reduce()
    random = torch.Generator().manual_seed(1)
    constants = {id(parameter) for parameter in detector.constants()}
    for name, parameter in detector.named_parameters():
        if id(parameter) not in constants and not name.startswith("model.model.backbone"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=random)
    return detector


def tiny_batch(padded: bool = True, side: int | None = None) -> tuple[Tensor, Tensor]:
    """Three images and their masks; the second and third are padded on the right and at the bottom."""
    random = torch.Generator().manual_seed(2)
    height, width = (side, side) if side else (96, 128)
    images, mask = torch.randn(3, 3, height, width, generator=random), torch.ones(3, height, width, dtype=torch.bool)
    if padded:
        mask[1, height * 3 // 4 :] = False
        mask[2, :, width // 2 :] = False
    return images * mask[:, None], mask


def tiny_targets(counts: tuple[int, ...] = (2, 0, 4), classes: int = 3) -> Targets:
    """Labels of that many boxes an image."""
    random = torch.Generator().manual_seed(6)
    labels = torch.full((len(counts), max(counts)), -1)
    for row, count in enumerate(counts):
        labels[row, :count] = torch.randint(classes, (count,), generator=random)
    boxes = torch.rand(*labels.shape, 4, generator=random)
    return Targets(labels, torch.cat((0.3 + 0.4 * boxes[..., :2], 0.1 + 0.4 * boxes[..., 2:]), -1))


def region_queries(batch: int = 3) -> Tensor:
    return torch.randn(batch, QUERIES, WIDTH, generator=torch.Generator().manual_seed(3))


def gradients_in_half_precision_are_numbers(case: str, device: str, dtype: torch.dtype) -> None:
    """Check it of a detector that is shown padded images under autocast."""
    detector = tiny_detector(case, dropout=0.1).to(device).train()
    images, mask = (x.to(device) for x in tiny_batch())
    with torch.autocast(device, dtype):
        memory = detector.encode(detector.features(images, mask), mask)
        decoded = detector.decode(memory, region_queries().to(device))
    (decoded.states.float().mean() + decoded.boxes.float().mean()).backward()
    assert memory.tokens.isfinite().all()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
