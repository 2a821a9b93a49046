"""Which query answers for which region: Hungarian matching of a whole step at once (paper §3.2; DETR §3.1).

The costs of all decoder layers, directions and images are computed on the device in one batch. The assignment is an
operation, ``siamese_detr::assign``. Its reference copies all costs to the host at once, where SciPy solves them; a
kernel for CUDA devices leaves them where they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from siamese_detr.detection.boxes import box_corners, generalized_iou
from siamese_detr.detectors.functional import full_precision
from siamese_detr.errors import UserError
from siamese_detr.runtime.gpu import send

OBJECT, NO_OBJECT = 1, 2  # index 0 of the three classes is never used: class ids start at 1, as in COCO


class NonFiniteError(UserError):
    """Predictions or boxes are NaN or infinite: training has diverged, or the input is broken.

    Args:
        samples: positions in the batch of the images concerned.
    """

    def __init__(self, samples: list[int]) -> None:
        super().__init__(
            f"non-finite predictions or boxes for samples {samples} of the batch: training has diverged, or a backbone "
            "feature is NaN (lower the learning rate, use bf16 instead of fp16, or look at these images)"
        )
        self.samples = samples

    def __reduce__(self) -> tuple:
        return type(self), (self.samples,)


@dataclass(frozen=True)
class MatchCosts:
    """Weights of the matching cost: ``-label * p(object) + box * L1 - giou * GIoU``."""

    label: float = 1.0
    box: float = 5.0
    giou: float = 2.0


@torch.no_grad()
def match_costs(logits: Tensor, boxes: Tensor, targets: Tensor, costs: MatchCosts | None = None) -> Tensor:
    """The cost of answering target p with query q.

    Args:
        logits: (layers, V, B, Q, 3) class scores.
        boxes: (layers, V, B, Q, 4) predicted boxes, normalised cxcywh.
        targets: (V, B, P, 4) boxes to be found, normalised cxcywh.
        costs: the weights; the paper's by default.

    Returns:
        (layers, V, B, P, Q), float32 or float64.
    """
    costs = costs or MatchCosts()
    boxes, targets = full_precision(boxes), full_precision(targets)
    answer = full_precision(logits).softmax(-1)[..., OBJECT].unsqueeze(-2)
    distance = box_distance(targets.to(boxes.dtype), boxes)
    overlap = generalized_iou(box_corners(targets).unsqueeze(-2), box_corners(boxes).unsqueeze(-3))
    return distance.mul_(costs.box).sub_(answer, alpha=costs.label).sub_(overlap, alpha=costs.giou)


def box_distance(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance (..., P, Q) of boxes a (..., P, 4) and b (..., Q, 4), summed coordinate by coordinate.

    (``torch.cdist``, made for long vectors, took a millisecond of a step of 64 images on a GPU.)
    """
    pairs = zip(a.unsqueeze(-2).unbind(-1), b.unsqueeze(-3).unbind(-1), strict=True)
    apart = [(x - y).abs_() for x, y in pairs]
    return apart[0].add_(apart[1]).add_(apart[2].add_(apart[3]))


def assign(cost: Tensor, valid: Tensor | None = None) -> Tensor:
    """The cheapest one-to-one assignment of queries to targets, for every leading index.

    Args:
        cost: (..., B, P, Q) with P <= Q, as :func:`match_costs` gives it; the third axis from the end counts the batch.
        valid: bool, broadcastable to (..., B, P); rows that are False are padding and take no query.

    Returns:
        int64 (..., B, P) on the device of ``cost``: the query of each target, 0 for padding rows (mask them with
        ``valid``).

    Raises:
        NonFiniteError: a cost of a valid row is NaN or infinite. A CUDA kernel does not raise, since finding out would
            wait for the device: there such a pair is the last choice, and the loss is not finite either.
        ValueError: more targets than queries.
    """
    *outer, targets, queries = cost.shape
    if targets > queries:
        raise ValueError(f"{targets} targets cannot be matched to {queries} queries")
    if valid is None:
        valid = torch.ones((), dtype=torch.bool, device=cost.device)
    return assign_operation(cost.detach(), valid.expand(*outer, targets).contiguous())


@torch.library.custom_op("siamese_detr::assign", mutates_args=())
def assign_operation(cost: Tensor, valid: Tensor) -> Tensor:
    """Shortest augmenting paths (Jonker and Volgenant), problem by problem, on the host."""
    *outer, targets, _ = cost.shape
    # Costs and mask travel in one copy.
    packed = torch.cat([cost.flatten(), valid.flatten().to(cost.dtype)]).cpu().numpy()
    table = packed[: cost.numel()].reshape(cost.shape)
    mask = packed[cost.numel() :].reshape(*outer, targets) != 0
    finite = np.isfinite(table).all(-1) | ~mask
    if not finite.all():
        broken = ~finite.all(-1)
        raise NonFiniteError(np.flatnonzero(broken.reshape(-1, broken.shape[-1]).any(0)).tolist())
    chosen = np.zeros((*outer, targets), dtype=np.int64)
    for place in np.ndindex(*outer):
        rows = np.flatnonzero(mask[place])
        chosen[place][rows] = linear_sum_assignment(table[place][rows])[1]
    return send(torch.from_numpy(chosen), cost.device)


@assign_operation.register_fake
def _(cost: Tensor, valid: Tensor) -> Tensor:
    return cost.new_empty(valid.shape, dtype=torch.int64)


def match(
    logits: Tensor, boxes: Tensor, targets: Tensor, valid: Tensor | None = None, costs: MatchCosts | None = None
) -> Tensor:
    """:func:`assign` on :func:`match_costs`: int64 (layers, V, B, P), the query of each target."""
    return assign(match_costs(logits, boxes, targets, costs), valid)
