"""Label files of the other forms, written from a data set, and comparing what is read of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from siamese_detr.images import DetectionDataset


def write_voc(root: Path, dataset: DetectionDataset) -> Path:
    """The dataset as a VOC folder: corners counted from 1, crowds as 'difficult'."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    for image in dataset.images:
        (root / "JPEGImages" / image.path.name).write_bytes(image.path.read_bytes())
        objects = "".join(
            f"<object><name>{dataset.class_names[c]}</name><difficult>{int(crowd)}</difficult><bndbox>"
            f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>"
            f"<part><name>head</name></part></object>"
            for (x1, y1, x2, y2), c, crowd in zip(image.boxes, image.classes, image.crowd, strict=True)
        )
        (root / "Annotations" / f"{image.path.stem}.xml").write_text(
            f"<annotation><filename>{image.path.name}</filename><size><width>{image.width}</width>"
            f"<height>{image.height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    stems = [image.path.stem for image in dataset.images]
    (root / "ImageSets/Main/train.txt").write_text("\n".join(stems[:4]) + "\n")
    (root / "ImageSets/Main/val.txt").write_text("\n".join(f"{stem} 1" for stem in stems[4:]) + "\n")
    return root


def write_yolo(root: Path, dataset: DetectionDataset, names: object = None) -> Path:
    """The dataset as a YOLO folder with the splits train (four images) and val; returns its data.yaml."""
    for n, image in enumerate(dataset.images):
        split = "train" if n < 4 else "val"
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        (root / "images" / split / image.path.name).write_bytes(image.path.read_bytes())
        size = np.array([image.width, image.height] * 2)
        lines = []
        for box, class_ in zip(image.boxes / size, image.classes, strict=True):
            x1, y1, x2, y2 = box.tolist()
            lines.append(f"{class_} {(x1 + x2) / 2} {(y1 + y2) / 2} {x2 - x1} {y2 - y1}")
        (root / "labels" / split / f"{image.path.stem}.txt").write_text("\n".join(lines))
    path = root / "data.yaml"
    path.write_text(json.dumps({"names": names or dataset.class_names, "train": "images/train", "val": "images/val"}))
    return path


def kinds(dataset: DetectionDataset) -> dict[str, int]:
    """How many faults of each kind were found."""
    return {problem.kind: problem.count for problem in dataset.problems}


def assert_same_labels(a: DetectionDataset, b: DetectionDataset, tolerance: float = 0) -> None:
    assert a.class_names == b.class_names
    assert [i.path.name for i in a.images] == [i.path.name for i in b.images]
    for one, other in zip(a.images, b.images, strict=True):
        assert (one.width, one.height) == (other.width, other.height)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=tolerance)
        np.testing.assert_array_equal(one.classes, other.classes)
