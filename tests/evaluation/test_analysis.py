"""Precision–recall, confusion and image quality on cases counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from siamese_detr.evaluation.analysis import (
    confusion_matrix,
    image_quality,
    iou_matrix,
    rows_by_image,
)
from siamese_detr.evaluation.coco import Detections, coco_metrics
from siamese_detr.images.labels import DetectionDataset, LabelledImage


def labelled(id: int, boxes: list[list[float]], classes: list[int], crowd: list[bool] | None = None) -> LabelledImage:
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    return LabelledImage(
        id=id,
        path=Path(f"{id}.jpg"),
        width=100,
        height=100,
        boxes=corners,
        areas=(corners[:, 2:] - corners[:, :2]).prod(1),
        classes=np.array(classes, np.int64),
        crowd=np.array(crowd or [False] * len(classes), bool),
        scores=np.full(len(classes), np.nan, np.float32),
    )


CAT, DOG = 0, 1
DATASET = DetectionDataset(
    root=Path(),
    class_names=["cat", "dog"],
    images=[
        labelled(1, [[0, 0, 10, 10], [50, 50, 70, 70]], [CAT, DOG]),
        labelled(2, [[20, 20, 40, 40], [0, 0, 100, 100]], [CAT, CAT], [False, True]),
        labelled(3, [], []),
    ],
)
DETECTIONS = Detections.from_rows(
    np.array(
        [
            [1, CAT, 0.9, 0, 0, 10, 10],  # right
            [1, CAT, 0.8, 50, 50, 70, 70],  # a dog taken for a cat
            [2, CAT, 0.7, 60, 60, 80, 80],  # inside the crowd: neither right nor wrong
            [3, DOG, 0.6, 0, 0, 10, 10],  # nothing is there
            [2, CAT, 0.1, 20, 20, 40, 40],  # right, but unsure
        ]
    )
)


def test_iou_of_crowds_is_the_share_of_the_box_inside() -> None:
    found, truth = np.array([[0, 0, 10, 10]]), np.array([[5, 0, 15, 10], [0, 0, 100, 100]])
    assert iou_matrix(found, truth, np.array([False, True])) == pytest.approx(np.array([[1 / 3, 1.0]]))


def test_precision_at_every_recall() -> None:
    cat, dog = coco_metrics(DATASET.to_coco(), DETECTIONS).per_class
    assert cat.boxes == 2
    assert cat.precision50 == pytest.approx([1.0] * 51 + [2 / 3] * 50)
    assert dog.precision50 == pytest.approx([0.0] * 101)
    assert np.mean(cat.precision50) == pytest.approx(cat.ap50)


def test_confusion() -> None:
    assert confusion_matrix(DATASET, DETECTIONS.above(np.full(2, 0.3))).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert confusion_matrix(DATASET, DETECTIONS)[CAT, CAT] == 2


def test_image_quality() -> None:
    detections = DETECTIONS.above(np.full(2, 0.3))
    rows = rows_by_image(detections)
    assert image_quality(DATASET.images[0], detections, rows[1]) == pytest.approx(1 / 2)
    assert image_quality(DATASET.images[2], detections, rows[3]) == 0
    assert image_quality(DATASET.images[2], detections, np.zeros(0, np.int64)) is None
