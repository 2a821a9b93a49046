"""Boxes as tensors: ``xyxy`` in pixels and normalised ``cxcywh``, and how far they overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def box_corners(boxes: Tensor) -> Tensor:
    """cxcywh (..., 4) to xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def normalise_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Pixels xyxy (..., P, 4) to cxcywh normalised by the un-padded ``sizes`` (..., 2) = (height, width)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    scale = sizes.flip(-1).to(boxes.dtype).unsqueeze(-2)
    return torch.cat([(low + high) / 2 / scale, (high - low) / scale], dim=-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU in [0, 1] of xyxy boxes (..., 4), broadcast against each other; 0 where both are empty."""
    overlap, union = _overlap_and_union(a, b)
    return overlap / _positive(union)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU in [-1, 1] of xyxy boxes (..., 4), broadcast against each other (Rezatofighi et al., 2019).

    Degenerate boxes are allowed (0 for two empty boxes in the same place), so neither values nor gradients are ever NaN
    for finite input. That is why ``torchvision.ops`` is not used: it divides 0 by 0 there.
    """
    overlap, union = _overlap_and_union(a, b)
    # The hull is the smallest box around both: the more of it is empty, the farther apart they are.
    width = torch.maximum(a[..., 2], b[..., 2]) - torch.minimum(a[..., 0], b[..., 0])
    height = torch.maximum(a[..., 3], b[..., 3]) - torch.minimum(a[..., 1], b[..., 1])
    hull = width * height
    return overlap / _positive(union) - (hull - union) / _positive(hull)


def _overlap_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = width * height
    return overlap, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap


def _positive(area: Tensor) -> Tensor:
    return area.clamp(min=torch.finfo(area.dtype).eps ** 2)  # a box 1e-7 of the image wide and high
