"""Boxes as tensors: ``xyxy`` in pixels and normalised ``cxcywh``, and how far they overlap."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """``x`` in float32, or float64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def box_corners(boxes: Tensor) -> Tensor:
    """cxcywh (..., 4) to xyxy."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def normalise_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Pixels xyxy (..., P, 4) to cxcywh normalised by the un-padded ``sizes`` (..., 2) = (height, width)."""
    low, high = boxes[..., :2], boxes[..., 2:]
    scale = sizes.flip(-1).to(boxes.dtype).unsqueeze(-2)
    return torch.cat([(low + high) / 2 / scale, (high - low) / scale], dim=-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU in [-1, 1] of xyxy boxes (..., 4), broadcast against each other.

    Degenerate boxes are allowed (0 for two empty boxes in the same place), so neither values nor gradients are ever NaN
    for finite input.
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    overlap = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0) * (
        torch.minimum(ay2, by2) - torch.maximum(ay1, by1)
    ).clamp(min=0)
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap
    hull = (torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)) * (torch.maximum(ay2, by2) - torch.minimum(ay1, by1))
    smallest = torch.finfo(union.dtype).eps ** 2  # a box 1e-7 of the image wide and high
    return overlap / union.clamp(min=smallest) - (hull - union) / hull.clamp(min=smallest)
