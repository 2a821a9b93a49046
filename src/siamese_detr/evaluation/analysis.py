"""What a detector gets right and wrong in single images: the confusion matrix and a quality per image."""

from __future__ import annotations

import numpy as np
from faster_coco_eval.core import mask

from siamese_detr.evaluation.coco import Detections
from siamese_detr.images.labels import DetectionDataset, LabelledImage

NO_ROWS = np.zeros(0, np.int64)


def rows_by_image(detections: Detections) -> dict[int, np.ndarray]:
    """Row numbers of each image's detections, best score first."""
    order = np.lexsort((-detections.scores, detections.images))
    images, starts = np.unique(detections.images[order], return_index=True)
    return {int(i): rows for i, rows in zip(images, np.split(order, starts)[1:], strict=True)}


def iou_matrix(a: np.ndarray, b: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of (N, 4) and (M, 4) xyxy boxes: (N, M) float64 in [0, 1].

    Args:
        crowd: bool (M,); against these the union is ``a``'s own area, as COCO defines it.
    """
    if not (len(a) and len(b)):
        return np.zeros((len(a), len(b)))
    a, b = (np.concatenate([x[:, :2], x[:, 2:] - x[:, :2]], 1).astype(np.float64) for x in (a, b))  # xywh
    return mask.iou(a, b, [False] * len(b) if crowd is None else crowd.tolist())


def pair_up(
    image: LabelledImage, detections: Detections, rows: np.ndarray, iou: float
) -> tuple[dict[int, tuple[int, float]], np.ndarray, np.ndarray]:
    """Pair detections with labelled boxes by overlap alone, whatever the class, the largest overlap first.

    Detections inside crowds are left out.

    Args:
        rows: row numbers of the image's detections.
        iou: the least overlap of a pair.

    Returns:
        pairs (detection's row -> labelled box, IoU), numbers of the boxes to find, rows of the detections that count.
    """
    overlaps = iou_matrix(detections.boxes[rows], image.boxes, image.crowd)
    truth = np.flatnonzero(~image.crowd)
    fits = overlaps >= iou
    counts = ~fits[:, image.crowd].any(1) | fits[:, truth].any(1)
    rows, overlaps = rows[counts], overlaps[counts][:, truth]
    pairs: dict[int, tuple[int, float]] = {}
    while overlaps.size and (best := float(overlaps.max())) >= iou:
        row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
        pairs[int(rows[row])] = (int(truth[column]), best)
        overlaps[row, :] = overlaps[:, column] = -1
    return pairs, truth, rows


def confusion_matrix(dataset: DetectionDataset, detections: Detections, iou: float = 0.5) -> np.ndarray:
    """int64 (K+1, K+1): true class (row) against predicted class (column); the last of each is "nothing".

    Detections are paired with boxes by :func:`pair_up`.
    """
    nothing = len(dataset.class_names)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    by_image = rows_by_image(detections)
    for image in dataset.images:
        pairs, truth, rows = pair_up(image, detections, by_image.get(image.id, NO_ROWS), iou)
        for row in rows:
            label = image.classes[pairs[row][0]] if row in pairs else nothing
            matrix[label, detections.classes[row]] += 1
        for box in set(truth.tolist()) - {box for box, _ in pairs.values()}:
            matrix[image.classes[box], nothing] += 1
    return matrix


def image_quality(image: LabelledImage, detections: Detections, rows: np.ndarray, iou: float = 0.5) -> float | None:
    """Panoptic quality, in [0, 1]: summed IoU of right detections / (right + ½ wrong + ½ missed).

    Args:
        rows: the image's detections (see :func:`rows_by_image`).

    Returns:
        None for an image with nothing to find and nothing found.
    """
    pairs, truth, rows = pair_up(image, detections, rows, iou)
    right = [overlap for row, (box, overlap) in pairs.items() if detections.classes[row] == image.classes[box]]
    return 2 * sum(right) / (len(rows) + len(truth)) if len(rows) + len(truth) else None
