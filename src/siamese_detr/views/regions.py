"""The regions of an image: candidates (proposals, random boxes, random patches), and how they are selected."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torchvision.ops import nms

from siamese_detr.views.geometry import Array, areas, ious, shared_regions

RANDOM_CANDIDATES = 100
"""Random boxes drawn per image (ablation "random boxes")."""
MAX_ASPECT = 8.0
"""Largest ratio of the longer to the shorter side of a random box."""
MIN_PATCH = 8.0
"""Smallest side of a random patch, pixels (UP-DETR)."""


def choose_top(boxes: Array, scores: Array, count: int) -> Array:
    """The ``count`` best-scored of the boxes (n, 4), best first; fewer if there are fewer."""
    return boxes[np.argsort(-scores, kind="stable")[:count]]


def choose_diverse(
    boxes: Array, scores: Array, count: int, draws: ArrayLike, duplicate_iou: float = 0.8, besides: Array | None = None
) -> Array:
    """Up to ``count`` boxes of which no two overlap by more than ``duplicate_iou``, drawn with weights ``scores``.

    Args:
        boxes: (n, 4).
        scores: (n,); if none is positive, all weights are equal.
        draws: (n,) uniform in (0, 1), one for each box.
        besides: (4,), a box already chosen (the intersection): its near-duplicates are left out too.
    """
    if besides is not None:
        fresh = ious(boxes, besides) <= duplicate_iou
        boxes, scores, draws = boxes[fresh], scores[fresh], np.asarray(draws)[fresh]
    kept = nms(torch.from_numpy(boxes), torch.from_numpy(np.ascontiguousarray(scores)), duplicate_iou).numpy()
    weight = np.nan_to_num(np.maximum(scores[kept], 0))
    weight = np.where(weight > 0, weight, 1e-9 * weight.max() if weight.max(initial=0) > 0 else 1.0)
    # Exponential races: the smallest keys are a weighted sample without replacement (Efraimidis and Spirakis 2006).
    keys = -np.log(np.clip(np.asarray(draws)[kept], 1e-300, 1)) / weight
    return boxes[kept[np.argsort(keys, kind="stable")[:count]]]


def random_boxes(draws: ArrayLike, frame: ArrayLike, max_aspect: float = MAX_ASPECT) -> Array:
    """Boxes between random corners inside ``frame`` (4,), without those of a larger aspect ratio than ``max_aspect``.

    Args:
        draws: (n, 4) uniform in [0, 1).
    """
    low, high = np.split(np.asarray(frame, np.float64), 2)
    corners = low + np.asarray(draws, np.float64).reshape(-1, 2, 2) * (high - low)
    boxes = np.concatenate([corners.min(1), corners.max(1)], -1)
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    return boxes[(width <= max_aspect * height) & (height <= max_aspect * width) & (areas(boxes) > 0)]


def random_patches(draws: ArrayLike, size: tuple[int, int], min_side: float = MIN_PATCH) -> Array:
    """UP-DETR's patches (n, 4) of an image of ``size`` = (height, width), of uniformly drawn size and position.

    Args:
        draws: (n, 4) uniform in [0, 1): width, height, horizontal and vertical position.
    """
    draw = np.asarray(draws, np.float64)
    full = np.array([size[1], size[0]], np.float64)
    smallest = np.minimum(min_side, full)
    extent = smallest + draw[:, :2] * (full - smallest)
    corner = draw[:, 2:] * (full - extent)
    return np.concatenate([corner, np.minimum(corner + extent, full)], 1)


def candidate_regions(boxes: ArrayLike, scores: ArrayLike, frame: Array, min_area: float) -> tuple[Array, Array]:
    """Boxes (n, 4) cut to the frame and their scores, without those that cover less than ``min_area`` of it."""
    shared, kept = shared_regions(boxes, frame, min_area)
    return shared, np.asarray(scores, np.float64).reshape(-1)[kept]
