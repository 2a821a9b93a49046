"""Label files that are written: what is read of them is what was written, in every form."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from siamese_detr.errors import UserError
from siamese_detr.images import DetectionDataset, LabelledImage, read_labels
from siamese_detr.images.check import check
from siamese_detr.images.write import LabelForm, write_labels

SIZES = {"a.jpg": (40, 30), "a.png": (30, 50), "b/a.jpg": (64, 64), "images/c é.jpg": (20, 31)}
NAMES = st.text(st.characters(categories=("L", "N", "P", "S", "Zs")), min_size=1, max_size=8).filter(str.strip)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        for name, size in SIZES.items():
            path = Path(temporary, "photos", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size).save(path)
        yield Path(temporary)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[str], dict[str, list[tuple[int, list[float], bool, float]]]]:
    """Class names, and for each image its (class, box, crowd, score or NaN)."""
    names = draw(st.lists(NAMES.map(str.strip), min_size=1, max_size=4, unique=True))
    share = st.floats(0, 1)
    score = st.one_of(st.just(float("nan")), share) if draw(st.booleans()) else st.floats(0.01, 0.99)
    images = {}
    for name, (width, height) in SIZES.items():
        objects = []
        for _ in range(draw(st.integers(0, 3))):
            left, top, wide, high = (draw(share) for _ in range(4))
            x1, y1 = left * (width - 2), top * (height - 2)
            box = [x1, y1, x1 + 1.5 + wide * (width - x1 - 1.5), y1 + 1.5 + high * (height - y1 - 1.5)]
            box = np.round(box, 1).tolist()
            objects.append((draw(st.integers(0, len(names) - 1)), box, draw(st.booleans()), draw(score)))
        images[name] = objects
    return names, images


def as_dataset(root: Path, names: list[str], rows: dict[str, list]) -> DetectionDataset:
    images = []
    for number, (name, objects) in enumerate(rows.items()):
        classes, boxes, crowd, scores = ([row[k] for row in objects] for k in range(4))
        images.append(
            LabelledImage(
                number,
                root / name,
                *SIZES[name],
                boxes=np.array(boxes, np.float32).reshape(-1, 4),
                classes=np.array(classes, np.int64),
                crowd=np.array(crowd, bool),
                areas=np.ones(len(boxes), np.float32),
                scores=np.array(scores, np.float32),
            )
        )
    return DetectionDataset(root, names, images, category_ids=list(range(1, len(names) + 1)))


@settings(max_examples=40, deadline=None)
@given(rows=rows(), form=st.sampled_from(["coco", "voc", "yolo"]))
def test_what_is_read_is_what_was_written(folder: Path, rows: tuple, form: LabelForm) -> None:
    names, objects = rows
    dataset = as_dataset(folder / "photos", names, objects)
    out = Path(tempfile.mkdtemp(dir=folder)) / "labels"
    write_labels(dataset, out, form)
    kept = {image.path: ~image.crowd | (form != "yolo") for image in dataset.images}
    if not any(keep.any() for keep in kept.values()):
        with pytest.raises(UserError):
            read_labels(out)
        return
    again = read_labels(out)
    read = {image.path.stat().st_ino: image for image in again.images}
    assert len(read) == len(again.images) == len(kept)
    for image in dataset.images:
        keep, found = kept[image.path], read[image.path.stat().st_ino]
        assert (found.width, found.height) == (image.width, image.height)
        # YOLO passes over a line that is there already.
        _, first = np.unique(
            [f"{c} {b.tolist()}" for c, b in zip(image.classes, image.boxes, strict=True)], return_index=True
        )
        if len(first) < len(keep):
            continue
        assert [again.class_names[k] for k in found.classes] == [names[k] for k in image.classes[keep]]
        np.testing.assert_allclose(found.boxes, image.boxes[keep], atol=0.01)
        assert found.crowd.tolist() == image.crowd[keep].tolist()
        np.testing.assert_allclose(found.scores, image.scores[keep], atol=1e-5)


def write_coco(path: Path, names: dict[int, str], boxes: list[tuple[str, int, list[float], float | None]]) -> str:
    """A COCO JSON of (file, category id, box, score)."""
    files = list(dict.fromkeys(file for file, *_ in boxes))
    annotations = [
        {"image_id": files.index(file), "category_id": category, "bbox": box, "area": 9, "id": k}
        | ({} if score is None else {"score": score})
        for k, (file, category, box, score) in enumerate(boxes)
    ]
    images = [{"id": k, "file_name": file, "width": 40, "height": 30} for k, file in enumerate(files)]
    categories = [{"id": k, "name": name} for k, name in names.items()]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(path)


def test_several_label_sources_are_one_data_set(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    one, two, three = [0, 0, 9, 9], [9, 9, 9, 9], [20, 5, 9, 9]
    found = [("a.jpg", 0, one, 0.9), ("c.jpg", 1, two, 0.8), ("c.jpg", 2, one, 0.7)]
    pseudo = write_coco(tmp_path / "pseudo.json", {0: "Dog", 1: "cat", 2: "zebra"}, found)
    hand = write_coco(tmp_path / "hand.json", {3: "cat", 7: "dog"}, [("a.jpg", 3, one, None), ("b.jpg", 7, two, None)])
    more = [("a.jpg", 1, one, None), ("a.jpg", 1, three, None)]
    other = write_coco(tmp_path / "other.json", {1: "cat"}, more)

    dataset = read_labels([pseudo, hand, other])
    assert dataset.class_names == ["cat", "dog", "zebra"]
    labels = {image.path.name: [dataset.class_names[k] for k in image.classes] for image in dataset.images}
    # Of a.jpg, which people have labelled, what a detector found is left out, and the box in two files is one box.
    assert labels == {"a.jpg": ["cat", "cat"], "b.jpg": ["dog"], "c.jpg": ["cat", "zebra"]}
    assert dataset.pseudo_counts().tolist() == [1, 0, 1]
    assert [image.id for image in dataset.images] == [1, 2, 3]
    assert [(problem.count, problem.where) for problem in dataset.problems] == [(1, other), (1, pseudo)]

    assert read_labels([hand]).class_names == read_labels(hand).class_names
    with pytest.raises(UserError, match="no labels are named"):
        read_labels([])
    report = check(data=[hand, pseudo], near_duplicates=False)
    assert {row.name: (row.boxes, row.pseudo_labels) for row in report.classes} == {
        "cat": (2, 1),
        "dog": (1, 0),
        "zebra": (1, 1),
    }


def test_labels_are_written_whole_or_not(tmp_path: Path, folder: Path) -> None:
    box = [(0, [1, 1, 9, 9], False, 0.5)]
    dataset = as_dataset(folder / "photos", ["cat"], {name: box for name in SIZES})
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/mine.xml").touch()
    with pytest.raises(OSError, match="labels"):
        write_labels(dataset, tmp_path / "labels", "coco")
    assert [path.name for path in tmp_path.rglob("*")] == ["labels", "mine.xml"]


def test_other_packages_read_what_was_written(tmp_path: Path, folder: Path) -> None:
    supervision = pytest.importorskip("supervision")
    box = [(1, [1, 2, 9, 12], False, 0.5)]
    dataset = as_dataset(folder / "photos", ["cat", "dog"], {name: box for name in SIZES if "/" not in name})
    for form in ("coco", "voc", "yolo"):
        write_labels(dataset, tmp_path / form, form)
    read = supervision.DetectionDataset
    for found in (
        read.from_coco(str(tmp_path / "coco/images"), str(tmp_path / "coco/labels.json")),
        read.from_pascal_voc(str(tmp_path / "voc/JPEGImages"), str(tmp_path / "voc/Annotations")),
        read.from_yolo(*(str(tmp_path / "yolo" / name) for name in ("images", "labels", "data.yaml"))),
    ):
        boxes = {Path(path).name: found.annotations[path] for path in found.image_paths}
        assert boxes.keys() == {"a.jpg", "a.png.png"}
        for name, detections in boxes.items():
            np.testing.assert_allclose(detections.xyxy, [[1, 2, 9, 12]], atol=1.01, err_msg=name)
            assert [found.classes[k] for k in detections.class_id] == ["dog"]
