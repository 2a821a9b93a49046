"""Precision–recall, confusion and image quality on cases counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from siamese_detr.evaluation.analysis import (
    confusion_matrix,
    image_quality,
    iou_matrix,
    precision_recall,
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


def test_precision_and_recall() -> None:
    cat, dog = precision_recall(DATASET, DETECTIONS)
    assert cat.boxes == 2
    assert cat.recall == pytest.approx([0.5, 0.5, 1.0])
    assert cat.precision == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert dog.recall.tolist() == [0.0]


def test_the_area_under_the_curve_is_coco_ap50() -> None:
    random = np.random.default_rng(0)
    images, rows = [], []
    for number in range(1, 30):
        corners = random.uniform(0, 70, (3, 2))
        boxes = np.concatenate([corners, corners + random.uniform(8, 30, (3, 2))], 1)
        images.append(labelled(number, boxes.tolist(), random.integers(0, 2, 3).tolist()))
        for box in boxes[:2]:
            rows.append([number, random.integers(0, 2), random.random(), *(box + random.normal(0, 2, 4))])
    dataset = DetectionDataset(root=Path(), class_names=["cat", "dog"], images=images)
    truth = {
        "images": [{"id": i.id, "width": 100, "height": 100} for i in images],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": i.id, "category_id": int(k) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
            for i in images
            for (x1, y1, x2, y2), k in zip(i.boxes.astype(float).tolist(), i.classes, strict=True)
        ],
    }
    detections = Detections.from_rows(np.array(rows))
    expected = coco_metrics(truth, detections).per_class
    for curve, row in zip(precision_recall(dataset, detections), expected, strict=True):
        at = np.searchsorted(curve.recall, np.linspace(0, 1, 101), side="left")
        ap50 = np.append(curve.precision, 0)[at].mean()
        assert ap50 == pytest.approx(row.ap50, abs=1e-9)


def test_confusion() -> None:
    assert confusion_matrix(DATASET, DETECTIONS).tolist() == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert confusion_matrix(DATASET, DETECTIONS, score=0.05)[CAT, CAT] == 2


def test_image_quality() -> None:
    rows = rows_by_image(DETECTIONS)
    assert image_quality(DATASET.images[0], DETECTIONS, rows[1]) == pytest.approx(1 / 2)
    assert image_quality(DATASET.images[2], DETECTIONS, rows[3]) == 0
    assert image_quality(DATASET.images[2], DETECTIONS, np.zeros(0, np.int64)) is None
