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

from siamese_detr.detection.boxes import box_corners, generalized_iou
from siamese_detr.detection.matching import NO_OBJECT, OBJECT
from siamese_detr.detectors.functional import full_precision


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
    taken = torch.zeros(logits.shape[:-1], device=logits.device, dtype=torch.int32)
    taken = taken.scatter_add(3, matches, valid.to(taken.dtype).expand_as(matches)) > 0
    score = F.log_softmax(full_precision(logits), dim=-1)
    total = -torch.where(taken, score[..., OBJECT], no_object_weight * score[..., NO_OBJECT]).sum((2, 3))
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
    giou = 1 - generalized_iou(box_corners(boxes), box_corners(targets))
    return _per_region(distance, valid, counts), _per_region(giou, valid, counts)


def region_loss(features: Tensor, targets: Tensor, valid: Tensor, counts: Counts) -> Tensor:
    """L_region, region discrimination: squared distance of the normalised vectors, divided by the number of regions.

    Args:
        features: (layers, V, B, P, C) predicted from the states of the matched queries.
        targets: (V, B, P, C) frozen features of the regions.
        valid: bool (V, B, P).
        counts: as :func:`count` gives them for ``valid``.

    Returns:
        (layers, V), each in [0, 4].
    """
    # ‖a/|a| − b/|b|‖² = 2 − 2 cos(a, b), without tensors the size of the features
    predicted, target = full_precision(features), F.normalize(full_precision(targets), dim=-1)
    length = torch.linalg.vector_norm(predicted, dim=-1).clamp(min=1e-8)
    cosine = torch.linalg.vecdot(predicted, target.to(predicted.dtype).expand_as(predicted)) / length
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
