"""Reading labels: the three forms agree, faults are counted or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from label_files import assert_same_labels, kinds, write_voc, write_yolo
from siamese_detr.errors import UserError
from siamese_detr.images import read_labels
from siamese_detr.images.check import check


def edited(path: Path, edit: Callable[[dict], object]) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_coco(coco: Path, photos: Path) -> None:
    dataset = read_labels(coco)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.category_ids == [3, 7]
    assert [image.id for image in dataset.images] == [10, 11, 12, 13, 14, 15]
    image = dataset.images[1]
    assert image.path == photos / "1.jpg"
    assert image.path.is_absolute()
    assert (image.width, image.height) == (160, 120)
    assert image.boxes.tolist() == [[10, 25, 50, 55], [15, 25, 55, 55]]
    assert image.classes.tolist() == [1, 0]
    assert (image.boxes.dtype, image.classes.dtype, image.crowd.dtype) == (np.float32, np.int64, bool)
    assert not image.crowd.any()
    assert dataset.problems == []
    assert dataset.class_counts().tolist() == [[6, 6], [3, 3]]


def test_the_three_forms_agree(coco: Path, tmp_path: Path) -> None:
    edited(coco, lambda c: c["annotations"][0].update(iscrowd=1))
    dataset = read_labels(coco)
    voc = write_voc(tmp_path / "voc", dataset)
    yolo = write_yolo(tmp_path / "yolo", dataset)
    assert_same_labels(dataset, read_labels(voc))
    assert [i.crowd.tolist() for i in dataset.images] == [i.crowd.tolist() for i in read_labels(voc).images]
    first, last = dataset.take(1), dataset.take(1)
    first.images, last.images = dataset.images[:4], dataset.images[4:]
    for train, val in (
        (read_labels(voc, split="train"), read_labels(voc, split="val")),
        (read_labels(voc / "ImageSets/Main/train.txt"), read_labels(voc / "ImageSets/Main/val.txt")),
        (read_labels(yolo), read_labels(yolo, split="val")),
        (read_labels(yolo), read_labels(yolo, default_split="val")),
        (read_labels(yolo.parent, split="train"), read_labels(yolo.parent, split="val")),
    ):
        assert_same_labels(first, train, 1e-3)
        assert_same_labels(last, val, 1e-3)
    assert_same_labels(dataset, read_labels(voc, images=str(coco.parent / "photos")))


def test_round_trip_through_coco(coco: Path, tmp_path: Path) -> None:
    edited(coco, lambda c: c["annotations"][0].update(iscrowd=1, area=77.5))
    dataset = read_labels(coco)
    for original in (False, True):
        content = dataset.to_coco(original_ids=original)
        assert [c["id"] for c in content["categories"]] == ([3, 7] if original else [0, 1])
        path = coco.parent / "again.json"
        path.write_text(json.dumps(content))
        again = read_labels(path, images=str(dataset.root))
        assert again.images[0].areas.tolist() == [77.5]
        assert again.images[0].crowd.tolist() == [True]
        assert_same_labels(dataset, again)
        assert [i.id for i in again.images] == [i.id for i in dataset.images]


def test_faulty_boxes_are_dropped_or_clipped_and_counted(coco: Path) -> None:
    faults = {
        "malformed box": [
            None,
            "box",
            [1, 2, 3],
            [1, 2, 3, "4"],
            [1, 2, math.nan, 4],
            [1, 2, 3, math.inf],
            [True] * 4,
            {"x": 1},
        ],
        "box of zero size": [[5, 5, 0, 10], [5, 5, 10, -3]],
        "box outside the image": [[500, 5, 10, 10], [-50, -50, 20, 20]],
        "box partly outside the image": [[-10, 100, 1000, 1000]],
    }

    faults["malformed box"].append([1, 2, 3, 10**400])

    def edit(content: dict) -> None:
        common = {"image_id": 11, "category_id": 3}
        content["annotations"] += [{**common, "bbox": box} for boxes in faults.values() for box in boxes]
        content["annotations"] += [{"image_id": i, "category_id": 3, "bbox": [1, 1, 9, 9]} for i in (99, None, [], "x")]
        content["annotations"] += [{"image_id": 11, "category_id": i, "bbox": [1, 1, 9, 9]} for i in (4, None, {}, "x")]
        content["annotations"] += [{"bbox": [1, 1, 9, 9]}, 17]
        content["annotations"] += [{**common, "bbox": [0.2, 0, 160.4, 120.9]}]  # rounding, clipped without a word

    dataset = read_labels(edited(coco, edit))
    assert kinds(dataset) == {
        "malformed box": len(faults["malformed box"]) + 1,
        "box of zero size": 2,
        "box outside the image": 2,
        "box partly outside the image": 1,
        "box of an unknown image": 5,
        "box of an unknown class": 4,
    }
    assert dataset.images[1].boxes[2:].tolist() == [[0, 100, 160, 120], [np.float32(0.2), 0, 160, 120]]
    for problem in dataset.problems:
        assert problem.action
        assert 1 <= len(problem.examples) <= 5
        assert problem.kind in str(problem)


def test_duplicate_ids(coco: Path) -> None:
    def edit(content: dict) -> None:
        content["images"].append(dict(content["images"][0]))  # harmless: the same entry again
        content["images"].append({"id": 11, "file_name": "photos/5.jpg"})  # whose are the boxes of 11?
        first = content["annotations"][0]
        content["annotations"] += [dict(first), {**first, "bbox": [1, 2, 30, 40]}]

    dataset = read_labels(edited(coco, edit))
    assert [image.id for image in dataset.images] == [10, 12, 13, 14, 15]
    assert kinds(dataset)["duplicate image id"] == 2
    assert kinds(dataset)["repeated box"] == 1
    assert kinds(dataset)["duplicate annotation id"] == 1
    assert len(dataset.images[0].boxes) == 2
    ids = [annotation["id"] for annotation in dataset.to_coco()["annotations"]]
    assert len(set(ids)) == len(ids)


def test_faulty_images_are_left_out(coco: Path, photos: Path) -> None:
    (photos / "1.jpg").unlink()
    (photos / "2.jpg").write_bytes(b"broken")

    def edit(content: dict) -> None:
        for entry in content["images"]:
            del entry["width"]
        content["images"][3].update(width="160", height=None)
        content["images"] += [{"id": 50}, {"file_name": "photos/0.jpg"}, 3, {"id": 51, "file_name": "\0"}, {"id": []}]

    dataset = read_labels(edited(coco, edit))
    assert kinds(dataset) == {"malformed image entry": 5, "missing image": 1, "unreadable image": 1}
    assert [(i.id, i.width, i.height) for i in dataset.images] == [
        (10, 120, 160),
        (13, 120, 160),
        (14, 160, 120),
        (15, 160, 120),
    ]


def test_many_images_of_one_folder_are_looked_up_together(tmp_path: Path) -> None:
    entries = [{"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 10} for n in range(400)]
    for entry in entries[::2]:
        (tmp_path / entry["file_name"]).touch()
    boxes = [{"image_id": n, "category_id": 1, "bbox": [1, 1, 5, 5]} for n in range(400)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "x"}]}))
    dataset = read_labels(path)
    assert [i.id for i in dataset.images] == list(range(0, 400, 2))
    assert kinds(dataset) == {"missing image": 200}


def test_string_image_ids_are_renumbered(coco: Path) -> None:
    def edit(content: dict) -> None:
        for entry in content["images"]:
            entry["id"] = f"image {entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"image {entry['image_id']}"

    dataset = read_labels(edited(coco, edit))
    assert [i.id for i in dataset.images] == [1, 2, 3, 4, 5, 6]
    assert sum(len(i.boxes) for i in dataset.images) == 9


def test_repeated_class_names_stay_apart(coco: Path) -> None:
    dataset = read_labels(edited(coco, lambda c: c["categories"].append({"id": 0, "name": "cat"})))
    assert dataset.class_names == ["cat", "cat 3", "dog"]
    assert dataset.images[0].classes.tolist() == [1]
    dataset = read_labels(
        edited(coco, lambda c: c["categories"].extend([{"id": 0, "name": "cat"}, {"id": 9, "name": "cat 3"}]))
    )
    assert len(set(dataset.class_names)) == 4
    assert "cat 3" in dataset.class_names  # whose name it is


def test_chosen_classes(coco: Path) -> None:
    dataset = read_labels(coco, class_names=["dog", "bird"])
    assert dataset.class_names == ["dog", "bird"]
    assert dataset.class_counts()[:, 0].tolist() == [3, 0]
    assert kinds(dataset) == {"box of an unknown class": 6}
    assert len(set(dataset.category_ids)) == 2
    assert dataset.category_ids[0] == 7


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
        (lambda c: c.update(categories=None), "no list 'categories'"),
        (lambda c: c.update(categories=[]), "names no class"),
        (lambda c: c.update(categories=[{"id": "a"}, {"name": "b"}, 4]), "names no class"),
        (lambda c: c["categories"].append({"id": 3, "name": "cow"}), "'cat' and 'cow'"),
        (lambda c: c.update(images=[]), "no usable image"),
        (lambda c: c.update(annotations=[]), "no usable box in 6 images"),
        (lambda c: [a.update(bbox=None) for a in c["annotations"]], "no usable box .*malformed box: 9"),
        (
            lambda c: [a.update(bbox=[v / 200 for v in a["bbox"]]) for a in c["annotations"] if len(a["bbox"]) == 4],
            "not shares",
        ),
        (lambda c: [i.update(file_name="x" + i["file_name"]) for i in c["images"]], "none of its images"),
    ],
)
def test_unusable_coco(coco: Path, edit: Callable[[dict], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_labels(edited(coco, edit))
    assert "labels.json" in str(caught.value)


def test_not_labels(tmp_path: Path, photos: Path) -> None:
    for content in ("", "{", "[1, 2]", '"text"'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UserError, match=r"a\.json"):
            read_labels(tmp_path / "a.json")
    for path in (photos, photos / "0.jpg"):
        with pytest.raises(UserError, match="no known labels"):
            read_labels(path)
    with pytest.raises(UserError, match="does not exist"):
        read_labels(tmp_path / "b.json")
    (tmp_path / "b.json").touch()
    with pytest.raises(UserError, match=r"several label files.*a\.json, b\.json"):
        read_labels(tmp_path)


def test_take_is_nested_covering_and_reproducible(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    entries, boxes = [], []
    for n in range(300):
        entries.append({"id": n, "file_name": f"{n}.jpg", "width": 10, "height": 10})
        (tmp_path / f"{n}.jpg").touch()
        for class_ in {int(random.geometric(0.4)), int(random.geometric(0.4))} if n % 5 else ():
            boxes.append({"image_id": n, "category_id": min(class_, 9), "bbox": [1, 1, 5, 5]})
    boxes.append({"image_id": 17, "category_id": 10, "bbox": [1, 1, 5, 5], "iscrowd": 1})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, 12)]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": entries, "annotations": boxes, "categories": categories}))
    dataset = read_labels(path)
    existing = {c for image in dataset.images for c in image.classes.tolist()}
    assert len(existing) == 10
    for seed in range(5):
        before: set[int] = set()
        for fraction in (1e-9, 0.01, 0.05, 0.1, 0.5, 1):
            part = dataset.take(fraction, seed)
            ids = [image.id for image in part.images]
            assert ids == sorted(ids)
            assert before <= set(ids)
            assert len(ids) == round(300 * fraction) or len(ids) <= 10
            assert {c for image in part.images for c in image.classes.tolist()} == existing
            assert [image.id for image in dataset.take(fraction, seed).images] == ids
            before = set(ids)
        assert before == set(range(300))
    assert dataset.take(0.5, 0).images[0].boxes is not None
    assert [i.id for i in dataset.take(0.5, 0).images] != [i.id for i in dataset.take(0.5, 1).images]
    for fraction in (0, -1, 1.5, math.nan):
        with pytest.raises(UserError, match="fraction"):
            dataset.take(fraction)
    with pytest.raises(UserError, match="seed"):
        dataset.take(0.5, -1)


@pytest.mark.promise("hostile-files")
def test_a_wrong_size_in_the_labels_is_named(coco: Path) -> None:
    """A COCO JSON that gives another size than the picture has: boxes that leave it are kept where the picture has
    room for them, and the cause is reported where it has not."""
    content = json.loads(coco.read_text())
    for n in range(3):
        content["images"][n].update(width=30, height=30)  # boxes begin at (10, 20 + 5 n), 40x30 pixels
    content["annotations"].append({"id": 90, "image_id": 12, "category_id": 3, "bbox": [500, 500, 10, 10]})
    coco.write_text(json.dumps(content))
    dataset = read_labels(coco)
    found = {problem.kind: problem for problem in dataset.problems}
    assert found["wrong size in the labels"].count == 2
    assert "0.jpg: 30x30, the picture is 120x160" in found["wrong size in the labels"].examples[0]
    assert found["labels of a picture of another shape"].count == 1
    assert "2.jpg: 30x30, the picture is 160x120" in found["labels of a picture of another shape"].examples[0]
    assert [(image.width, image.height) for image in dataset.images[:2]] == [(120, 160), (160, 120)]
    assert [image.path.name for image in dataset.images[:3]] == ["0.jpg", "1.jpg", "3.jpg"]
    assert dataset.images[0].boxes.tolist() == [[10, 20, 50, 50]]
    report = check(str(coco))
    assert {("data", kind) for kind in found} <= {(finding.where, finding.kind) for finding in report.findings}
