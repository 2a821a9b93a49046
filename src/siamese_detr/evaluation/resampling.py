"""How much of an AP is luck of the photos: AP on resampled validation images (a bootstrap), matched only once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from siamese_detr.evaluation.analysis import NO_ROWS, iou_matrix, rows_by_image
from siamese_detr.evaluation.coco import MAX_DETECTIONS, Detections
from siamese_detr.images.labels import DetectionDataset

THRESHOLDS = np.arange(50, 100, 5) / 100
RECALLS = np.linspace(0, 1, 101)
CHUNK = 250
"""Resamples computed at a time, which bounds memory."""


@dataclass(frozen=True)
class ClassMatches:
    """The detections of one class in all images, best score first.

    Args:
        images: (N,) int64, numbers of their images in the data set.
        correct, ignored: bool (N, 10), per IoU threshold: matched with a box to find, or with a crowd.
        boxes: (images,) int64, boxes to find in each.
    """

    images: np.ndarray
    correct: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray


def resampled_ap(
    dataset: DetectionDataset, detections: Detections, resamples: int = 1000, seed: int = 0
) -> tuple[float, np.ndarray]:
    """COCO's AP, and what it would be on other draws of the validation images.

    Args:
        dataset: with the boxes to find.
        detections: in its images.
        resamples: how many sets of as many images are drawn, with replacement.
        seed: of the draws. The same seed and data set give the same sets, so that two detectors can be compared on
            each.

    Returns:
        AP in [0, 1] on the images themselves, and (resamples,) float64 on the sets drawn; NaN where there is no box.
    """
    count = len(dataset)
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    weights = np.concatenate([np.ones((1, count), np.int64), draws]).T.astype(np.float32)  # (images, sets)
    classes = [found for k in range(len(dataset.class_names)) if (found := match(dataset, detections, k)).boxes.any()]
    if not classes:
        return float("nan"), np.full(resamples, np.nan)
    parts = []
    for start in range(0, weights.shape[1], CHUNK):
        chunk = weights[:, start : start + CHUNK]
        aps = [class_ap(matches, chunk) for matches in classes]  # NaN where a set has no box of the class
        known = np.isfinite(aps).sum(0)
        parts.append(np.where(known > 0, np.nansum(aps, 0), np.nan) / np.maximum(known, 1))
    every = np.concatenate(parts)
    return float(every[0]), every[1:]


def match(dataset: DetectionDataset, detections: Detections, label: int) -> ClassMatches:
    """Pair the detections of a class with its labelled boxes as COCO does: each, best score first, with the free box
    that it overlaps most."""
    of_class = np.flatnonzero(detections.classes == label)
    mine = Detections(*(getattr(detections, name)[of_class] for name in ("images", "classes", "scores", "boxes")))
    by_image = rows_by_image(mine)
    parts, scores, boxes = [], [], np.zeros(len(dataset), np.int64)
    for number, image in enumerate(dataset.images):
        rows = by_image.get(image.id, NO_ROWS)[: MAX_DETECTIONS[-1]]
        inside = image.classes == label
        crowd = image.crowd[inside]
        boxes[number] = (~crowd).sum()
        overlaps = iou_matrix(mine.boxes[rows], image.boxes[inside], crowd)  # (detections, boxes)
        parts.append((np.full(len(rows), number), *match_image(overlaps, crowd)))
        scores.append(mine.scores[rows])
    order = np.argsort(-np.concatenate(scores), kind="stable")
    images, correct, ignored = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
    return ClassMatches(images, correct, ignored, boxes)


def match_image(overlaps: np.ndarray, crowd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections of an image are correct, and which are in a crowd: bool (N, 10) each.

    Args:
        overlaps: (N, M) IoU of detections, best score first, and boxes.
        crowd: bool (M,).
    """
    correct, ignored = np.zeros((2, len(overlaps), len(THRESHOLDS)), bool)
    free = np.tile(~crowd, (len(THRESHOLDS), 1))
    for row, overlap in enumerate(overlaps):
        if not overlap.size or overlap.max() < THRESHOLDS[0]:
            continue
        fits = overlap >= THRESHOLDS[:, None]  # (10, M)
        open_to = fits & free
        best = np.where(open_to, overlap, -1).argmax(1)
        correct[row] = open_to.any(1)
        ignored[row] = ~correct[row] & (fits & crowd).any(1)
        free[correct[row], best[correct[row]]] = False
    return correct, ignored


def class_ap(matches: ClassMatches, weights: np.ndarray) -> np.ndarray:
    """AP of one class, mean over the IoU thresholds, on sets of images: (sets,) float64.

    An image drawn n times has its detections and boxes n times. Precision is largest at correct detections, so only
    these are looked at, with the wrong ones before them as sums.

    Args:
        weights: (images, sets) float32, how often each image is in each set.
    """
    total = (matches.boxes @ weights).astype(np.float64)
    sums = np.zeros(weights.shape[1])
    for correct, ignored in zip(matches.correct.T, matches.ignored.T, strict=True):
        places = np.flatnonzero(correct)
        if not len(places):
            continue
        wrong = np.flatnonzero(~correct & ~ignored)
        behind = np.searchsorted(places, wrong)  # number of the next correct detection
        wrong, behind = wrong[behind < len(places)], behind[behind < len(places)]
        shape = (len(places), len(weights))
        between = csr_array((np.ones(len(wrong), np.float32), (behind, matches.images[wrong])), shape=shape)
        right = np.cumsum(weights[matches.images[places]], 0)
        precision = right / np.maximum(right + np.cumsum(between @ weights, 0), 1)
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        # How many of the recalls 0, 0.01, ... 1 are first reached at each of these detections.
        reached = np.searchsorted(RECALLS, right.astype(np.float64) / np.maximum(total, 1), side="right")
        sums += (precision * np.diff(reached, axis=0, prepend=0)).sum(0) / len(RECALLS)
    return np.where(total > 0, sums / len(THRESHOLDS), np.nan)
