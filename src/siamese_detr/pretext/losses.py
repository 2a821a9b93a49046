"""The losses of pre-training (paper §3.2–3.3), batched over decoder layers and directions.

Notation of the shapes: ``layers`` decoder layers; ``V`` directions (direction v decodes on the memory of view v); ``B``
images of this process; ``Q`` queries; ``P`` regions; ``C`` channels of the frozen backbone. Every per-layer loss is
(layers, V): the caller averages directions and sums layers. Boxes are cxcywh, normalised by the un-padded view. All are
computed in at least float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

OBJECT, NO_OBJECT = 1, 2  # index 0 of the three classes is never used: class ids start at 1, as in COCO


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


@dataclass(frozen=True)
class Counts:
    """What the losses are divided by, averaged over processes: N processes then give the loss of one with their joint
    batch.

    Args:
        regions: (V,) number of valid regions per process.
        images: () number of images per process.
    """

    regions: Tensor
    images: Tensor


def count(valid: Tensor, dtype: torch.dtype = torch.float32) -> Counts:
    """Counts of ``valid`` (V, B, P), the mean over all processes of the default group (one collective, no host
    sync).
    """
    local = F.pad(valid.sum((1, 2), dtype=dtype), (0, 1), value=valid.shape[1])  # filled on the device: no host copy
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(local)
        local = local / dist.get_world_size()
    return Counts(regions=local[:-1], images=local[-1])


def at_matches(x: Tensor, matches: Tensor) -> Tensor:
    """The rows of ``x`` (layers, V, B, Q, D) that ``matches`` (layers, V, B, P) name: (layers, V, B, P, D)."""
    return x.gather(3, matches.unsqueeze(-1).expand(*matches.shape, x.shape[-1]))


def class_loss(logits: Tensor, matches: Tensor, valid: Tensor, counts: Counts, no_object_weight: float = 0.1) -> Tensor:
    """L_cls: softmax cross-entropy over {unused, object, no-object}, a weighted mean over all queries of a direction.

    Args:
        logits: (layers, V, B, Q, 3).
        matches: (layers, V, B, P) query of each region.
        valid: bool (V, B, P).
        counts: as :func:`count` gives them for ``valid``.
        no_object_weight: weight of the queries without a region; the others weigh 1.

    Returns:
        (layers, V).
    """
    found = torch.zeros(logits.shape[:-1], device=logits.device, dtype=torch.int32)
    found = found.scatter_add(3, matches, valid.to(found.dtype).expand_as(matches)) > 0
    score = F.log_softmax(full_precision(logits), dim=-1)
    total = -torch.where(found, score[..., OBJECT], no_object_weight * score[..., NO_OBJECT]).sum((2, 3))
    queries = counts.images * logits.shape[3]
    weight = counts.regions + no_object_weight * (queries - counts.regions)
    return total / weight.clamp(min=1e-12)  # where nothing weighs, 0, not NaN


def box_losses(boxes: Tensor, targets: Tensor, valid: Tensor, counts: Counts) -> tuple[Tensor, Tensor]:
    """L_box, the L1 distance, and L_giou = 1 - GIoU, both divided by the number of regions.

    Args:
        boxes: (layers, V, B, P, 4) predictions of the matched queries, normalised cxcywh.
        targets: (V, B, P, 4).
        valid: bool (V, B, P).
        counts: as :func:`count` gives them for ``valid``.

    Returns:
        two tensors (layers, V).
    """
    boxes = full_precision(boxes)
    targets = torch.where(valid.unsqueeze(-1), full_precision(targets), 0.5)  # else NaN in padding reaches the gradient
    distance = (boxes - targets).abs().sum(-1)
    apart = 1 - generalized_iou(box_corners(boxes), box_corners(targets))
    return _per_region(distance, valid, counts), _per_region(apart, valid, counts)


def region_loss(features: Tensor, targets: Tensor, valid: Tensor, counts: Counts) -> Tensor:
    """L_region, region discrimination: squared distance of the normalised vectors, divided by the number of regions.

    Args:
        features: (layers, V, B, P, C) what the matched queries say of their regions.
        targets: (V, B, P, C) frozen features of the regions.
        valid: bool (V, B, P).
        counts: as :func:`count` gives them for ``valid``.

    Returns:
        (layers, V), each in [0, 4].
    """
    # ‖a/|a| − b/|b|‖² = 2 − 2 cos(a, b), without tensors the size of the features
    said, target = full_precision(features), F.normalize(full_precision(targets), dim=-1)
    length = torch.linalg.vector_norm(said, dim=-1).clamp(min=1e-8)
    cosine = torch.linalg.vecdot(said, target.to(said.dtype).expand_as(said)) / length
    return _per_region(2 - 2 * cosine, valid, counts)


def embedding_loss(features: Tensor, targets: Tensor, valid: Tensor, counts: Counts) -> Tensor:
    """DETReg's object embedding loss: mean absolute difference over regions and channels; arguments as
    :func:`region_loss`.
    """
    distance = (full_precision(features) - full_precision(targets)).abs().mean(-1)
    return _per_region(distance, valid, counts)


def global_loss(predictions: Tensor, projections: Tensor, counts: Counts) -> Tensor:
    """L_global, global discrimination, of two views (SimSiam, symmetric).

    Args:
        predictions: (2, B, D) g(h(e)) of each view.
        projections: (2, B, D) h(e) of each view; receives no gradient.
        counts: gives the number of images.

    Returns:
        scalar in [0, 4].
    """
    other = full_precision(projections).detach().flip(0)
    distance = 2 - 2 * F.cosine_similarity(full_precision(predictions), other, dim=-1)
    return distance.sum() / 2 / counts.images


def _per_region(values: Tensor, valid: Tensor, counts: Counts) -> Tensor:
    # where() rather than a product: padding may hold anything, also infinities
    return torch.where(valid, values, 0).sum((2, 3)) / counts.regions.clamp(min=1)
