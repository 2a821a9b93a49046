"""What a detector gets right and wrong: precision–recall curves, the confusion matrix, image quality."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from siamese_detr.evaluation.coco import Detections
from siamese_detr.images.labels import DetectionDataset, LabelledImage


@dataclass(frozen=True)
class PrecisionRecall:
    """One class at one IoU threshold.

    Args:
        name: the class.
        recall, precision: (N,) float64 in [0, 1], best score first, precision made monotone as COCO does.
        boxes: how many there are to find.
    """

    name: str
    recall: np.ndarray
    precision: np.ndarray
    boxes: int


def iou_matrix(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of (N, 4) and (M, 4) xyxy boxes: (N, M) in [0, 1].

    Args:
        crowd: bool (M,); against these the union is ``a``'s own area, as COCO does for its crowds.
    """
    a, b = np.asarray(a, np.float64).reshape(-1, 4), np.asarray(b, np.float64).reshape(-1, 4)
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    shared = sides.clip(min=0).prod(-1)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(-1), (b[:, 2:] - b[:, :2]).prod(-1)
    union = area_a[:, None] + area_b - shared
    if crowd is not None:
        union = np.where(crowd, area_a[:, None], union)
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def greedy_pairs(overlaps: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Pairs (row, column) of ``overlaps`` of at least ``threshold``, the largest first, each row and column once."""
    pairs = []
    overlaps = overlaps.copy()
    while overlaps.size:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        if overlaps[row, column] < threshold:
            break
        pairs.append((int(row), int(column)))
        overlaps[row, :] = overlaps[:, column] = -1
    return pairs


def rows_by_image(detections: Detections) -> dict[int, np.ndarray]:
    """Row numbers of each image's detections, best score first."""
    order = np.lexsort((-detections.scores, detections.images))
    images, starts = np.unique(detections.images[order], return_index=True)
    return {int(i): rows for i, rows in zip(images, np.split(order, starts[1:]), strict=True)}


NO_ROWS = np.zeros(0, np.int64)


def precision_recall(dataset: DetectionDataset, detections: Detections, iou: float = 0.5) -> list[PrecisionRecall]:
    """A curve per class of ``dataset``; crowd boxes are neither to be found nor count against a detection."""
    by_image = rows_by_image(detections)
    hit = np.zeros(len(detections), bool)
    ignored = np.zeros(len(detections), bool)
    boxes = np.zeros(len(dataset.class_names), np.int64)
    for image in dataset.images:
        np.add.at(boxes, image.classes[~image.crowd], 1)
        rows = by_image.get(image.id, NO_ROWS)
        overlaps = iou_matrix(detections.boxes[rows], image.boxes, image.crowd)
        overlaps[detections.classes[rows][:, None] != image.classes[None]] = 0
        taken = np.zeros(len(image.boxes), bool)
        for place, row in enumerate(rows):
            # As COCO: the best free box; a crowd takes any number, but only what fits no other.
            free = np.where(taken | image.crowd, 0, overlaps[place])
            if free.size and free.max() >= iou:
                taken[free.argmax()] = hit[row] = True
            else:
                ignored[row] = bool((overlaps[place][image.crowd] >= iou).any())
    curves = []
    for label, name in enumerate(dataset.class_names):
        rows = np.flatnonzero((detections.classes == label) & ~ignored)
        rows = rows[np.argsort(-detections.scores[rows], kind="stable")]
        found = np.cumsum(hit[rows])
        recall = found / max(boxes[label], 1)
        precision = found / np.arange(1, len(rows) + 1)
        curves.append(PrecisionRecall(name, recall, np.maximum.accumulate(precision[::-1])[::-1], int(boxes[label])))
    return curves


def confusion_matrix(
    dataset: DetectionDataset, detections: Detections, score: float = 0.3, iou: float = 0.5
) -> np.ndarray:
    """int64 (K+1, K+1): true class (row) against predicted class (column); the last of each is "nothing there".

    Detections of at least ``score`` are paired with boxes by overlap alone, whatever the class; crowds are left out.
    """
    count = len(dataset.class_names)
    matrix = np.zeros((count + 1, count + 1), np.int64)
    by_image = rows_by_image(detections)
    for image in dataset.images:
        pairs, truth, rows = pair_up(image, detections, by_image.get(image.id, NO_ROWS), score, iou)
        for row, column in pairs:
            matrix[image.classes[truth[column]], detections.classes[rows[row]]] += 1
        for column in set(range(len(truth))) - {column for _, column in pairs}:
            matrix[image.classes[truth[column]], count] += 1
        for row in set(range(len(rows))) - {row for row, _ in pairs}:
            matrix[count, detections.classes[rows[row]]] += 1
    return matrix


def pair_up(
    image: LabelledImage, detections: Detections, rows: np.ndarray, score: float, iou: float
) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Pairs (place in rows, place in truth), the true boxes and the detections' rows they refer to."""
    rows = rows[detections.scores[rows] >= score]
    truth = np.flatnonzero(~image.crowd)
    if image.crowd.any() and len(rows):
        fits = iou_matrix(detections.boxes[rows], image.boxes, image.crowd) >= iou
        rows = rows[~fits[:, image.crowd].any(1) | fits[:, ~image.crowd].any(1)]
    return greedy_pairs(iou_matrix(detections.boxes[rows], image.boxes[truth]), iou), truth, rows


def image_quality(
    image: LabelledImage, detections: Detections, rows: np.ndarray, score: float = 0.3, iou: float = 0.5
) -> float | None:
    """In [0, 1]: summed IoU of right detections / (right + ½ wrong + ½ missed), the measure known as panoptic quality.

    Args:
        rows: the image's detections (see :func:`rows_by_image`).

    Returns:
        None for an image with nothing to find and nothing found.
    """
    pairs, truth, rows = pair_up(image, detections, rows, score, iou)
    right = [(r, t) for r, t in pairs if detections.classes[rows[r]] == image.classes[truth[t]]]
    total = len(rows) + len(truth)
    if not total:
        return None
    overlaps = iou_matrix(detections.boxes[rows], image.boxes[truth])
    return float(sum(overlaps[r, t] for r, t in right) / (total / 2))
