"""AP on resampled images: the numbers of an evaluation that really repeats the images."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest

from siamese_detr.evaluation.coco import Detections, coco_metrics
from siamese_detr.evaluation.resampling import resampled_ap
from siamese_detr.images.labels import DetectionDataset, LabelledImage


def labelled(count: int, seed: int = 0, classes: int = 3) -> tuple[DetectionDataset, Detections]:
    """Images with boxes, some of them crowds, and detections of which about half lie near a box."""
    random = np.random.default_rng(seed)
    images, rows = [], []
    for number in range(1, count + 1):
        boxes = int(random.integers(0, 5))
        corner, size = random.uniform(0, 60, (boxes, 2)), random.uniform(10, 40, (boxes, 2))
        xyxy = np.concatenate([corner, corner + size], 1).astype(np.float32)
        kinds = random.integers(0, classes, boxes)
        crowd, areas = random.random(boxes) < 0.15, size.prod(1)
        by_hand = np.full(boxes, np.nan)
        images.append(LabelledImage(number, Path(f"{number}.jpg"), 100, 100, xyxy, kinds, crowd, areas, by_hand))
        for _ in range(8):
            if boxes and random.random() < 0.6:
                which = int(random.integers(boxes))
                box, label = xyxy[which] + random.normal(0, 2, 4), kinds[which]
            else:
                start = random.uniform(0, 60, 2)
                box, label = np.concatenate([start, start + random.uniform(5, 40, 2)]), random.integers(classes)
            rows.append([number, label, random.random(), *box])
    names = [f"class {k}" for k in range(classes)]
    return DetectionDataset(Path(), names, images), Detections.from_rows(np.array(rows))


def repeated(dataset: DetectionDataset, detections: Detections, numbers: np.ndarray) -> float | None:
    """AP of a data set made of the images of these numbers, each as often as it is among them."""
    images, parts = [], []
    for new, number in enumerate(numbers, 1):
        old = dataset.images[number]
        images.append(dataclasses.replace(old, id=new))
        mine = detections.images == old.id
        fields = (detections.classes[mine], detections.scores[mine], detections.boxes[mine])
        parts.append(Detections(np.full(int(mine.sum()), new), *fields))
    made = DetectionDataset(Path(), dataset.class_names, images)
    return coco_metrics(made.to_coco(), Detections.concatenate(parts)).ap


@pytest.mark.parametrize("seed", range(3))
def test_each_set_has_the_ap_of_an_evaluation_on_these_images(seed: int) -> None:
    dataset, detections = labelled(25, seed)
    own, resampled = resampled_ap(dataset, detections, 20, seed)
    assert own == pytest.approx(coco_metrics(dataset.to_coco(), detections).ap, abs=1e-6)
    draws = np.random.default_rng(seed).multinomial(25, np.full(25, 1 / 25), 20)
    for counts, ap in zip(draws, resampled, strict=True):
        assert ap == pytest.approx(repeated(dataset, detections, np.repeat(np.arange(25), counts)), abs=1e-6)


def test_nothing_found_is_zero_and_nothing_to_find_is_undefined() -> None:
    dataset, detections = labelled(5)
    assert resampled_ap(dataset, Detections.empty(), 10)[0] == 0
    for image in dataset.images:
        image.crowd[:] = True
    assert np.isnan(resampled_ap(dataset, detections, 10)[0])


def test_a_thousand_sets_take_seconds() -> None:
    dataset, detections = labelled(500, classes=5)
    began = time.process_time()
    _, resampled = resampled_ap(dataset, detections)
    assert len(resampled) == 1000
    assert time.process_time() - began < 10
