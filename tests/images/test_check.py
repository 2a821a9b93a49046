"""The verb `check`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import siamese_detr
from conftest import textured
from siamese_detr.errors import UserError
from siamese_detr.images.check import CheckConfig, CheckReport, check
from siamese_detr.images.duplicates import equal_groups, fingerprint, similar_groups
from siamese_detr.images.labels import read_labels


def found(report: CheckReport) -> dict[tuple[str, str], int]:
    return {(f.where, f.kind): f.count for f in report.findings}


def resaved(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(target, quality=60)


def test_nothing_to_find(coco: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check(str(coco), min_labels=3)
    assert report.ok
    assert report.images == report.readable == {"data": 6}
    assert [(c.name, c.boxes, c.images) for c in report.classes] == [("cat", 6, 6), ("dog", 3, 3)]
    printed = capsys.readouterr().out
    assert "no problems found" in printed
    assert "6 images, 6 readable" in printed
    assert "val boxes" not in printed


def test_everything_to_find(coco: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(coco.read_text())
    (photos / "0.jpg").write_bytes((photos / "0.jpg").read_bytes()[:900])
    shutil.copy(photos / "1.jpg", photos / "copy[1].jpg")
    resaved(photos / "2.jpg", photos / "again.jpg")
    textured(9, 20, 20).save(photos / "tiny.png")
    extra = ["copy[1].jpg", "again.jpg", "tiny.png"]
    for n, name in enumerate(extra):
        content["images"].append({"id": 30 + n, "file_name": f"photos/{name}"})
    content["images"][5].update(width=99)
    content["annotations"].append({"image_id": 11, "category_id": 3, "bbox": [150, 100, 50, 50]})
    content["annotations"].append({"image_id": 11, "category_id": 3, "bbox": [1, 1, 0, 0]})
    content["categories"].append({"id": 9, "name": "unicorn"})
    coco.write_text(json.dumps(content))

    (tmp_path / "val").mkdir()
    shutil.copy(photos / "3.jpg", tmp_path / "val/a.jpg")
    resaved(photos / "4.jpg", tmp_path / "val/b.jpg")
    textured(77).save(tmp_path / "val/c.jpg")
    val = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in "abc"],
        "annotations": [{"image_id": n, "category_id": i, "bbox": [5, 5, 50, 50]} for n, i in (("a", 1), ("b", 2))],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cow"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(val))

    report = check(
        CheckConfig(
            str(coco),
            val=str(tmp_path / "val.json"),
            out=str(tmp_path / "r.json"),
            fix=str(tmp_path / "fixed.json"),
            min_labels=4,
        )
    )
    assert found(report) == {
        ("data", "box of zero size"): 1,
        ("data", "box partly outside the image"): 1,
        ("data", "image without objects"): 3,
        ("val", "image ids are no integers, or very large"): 1,
        ("val", "image without objects"): 1,
        ("data", "unreadable image"): 1,
        ("data", "tiny image"): 1,
        ("data", "labels of a picture of another shape"): 1,
        ("data", "duplicate image (the same file)"): 1,
        ("data", "duplicate image (nearly the same picture)"): 1,
        ("data and val", "validation image also in data (the same file)"): 1,
        ("data and val", "validation image also in data (nearly the same picture)"): 1,
        ("data", "class without boxes"): 1,
        ("data", "class with fewer than 4 boxes"): 1,
        ("val", "class of data without boxes in val"): 1,
        ("val", "class unknown to data"): 1,
    }
    assert report.images == {"data": 8, "val": 3}
    assert report.readable == {"data": 7, "val": 3}
    assert all(f.action and f.examples for f in report.findings)
    assert json.loads((tmp_path / "r.json").read_text()) == report.to_dict()
    fixed = read_labels(tmp_path / "fixed.json")
    assert not fixed.problems
    assert len(fixed) == 7
    printed = capsys.readouterr().out
    assert f"{photos}/copy[1].jpg" in printed
    assert "validation" in printed


def test_processes_agree_with_one(tmp_path: Path) -> None:
    for n in range(70):
        textured(n % 60, 48, 40).save(tmp_path / f"{n}.jpg")
    (tmp_path / "70.jpg").write_bytes(b"broken")
    reports = [check(str(tmp_path), workers=workers) for workers in (1, 2)]
    assert reports[0] == reports[1]
    assert found(reports[0]) == {("data", "unreadable image"): 1, ("data", "duplicate image (the same file)"): 10}
    assert reports[0].classes == []


def test_yolo_validation_split_is_found_by_itself(tmp_path: Path) -> None:
    for n, split in enumerate(("train", "train", "val")):
        (tmp_path / "images" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / split).mkdir(parents=True, exist_ok=True)
        textured(n // 2 * 0 + n % 2).save(tmp_path / "images" / split / f"{n}.jpg")
        (tmp_path / "labels" / split / f"{n}.txt").write_text("0 0.5 0.5 0.5 0.5")
    path = tmp_path / "data.yaml"
    path.write_text("names: [cat]\ntrain: images/train\nval: images/val\n")
    report = siamese_detr.check(data=path, min_labels=1)
    assert report.images == {"data": 2, "val": 1}
    assert found(report) == {("data and val", "validation image also in data (the same file)"): 1}
    path.write_text("names: [cat]\ntrain: images/train\nval: images/nowhere\n")
    with pytest.raises(UserError, match="nowhere"):
        check(str(path), val=str(path))


def test_folder_of_pictures_with_other_files_beside(photos: Path) -> None:
    for name in ("0.json", "1.json"):
        (photos / name).write_text('{"camera": 1}')
        report = check(str(photos))
        assert report.readable == {"data": 6}
        assert found(report) == {("data", "no usable labels in the folder"): 1}


def test_bad_arguments(tmp_path: Path, photos: Path) -> None:
    for options in (
        {"data": tmp_path / "no"},
        {"data": photos, "workers": -1},
        {"data": photos, "out": tmp_path / "x/y"},
    ):
        with pytest.raises(UserError):
            check(**options)


def test_similar_pictures_are_grouped_and_different_ones_are_not(tmp_path: Path) -> None:
    paths: list[Path] = []
    for n in range(40):
        paths.append(tmp_path / f"{n}.jpg")
        textured(n, 200, 150).save(paths[-1], quality=95)
    for n in range(0, 40, 4):
        paths.append(tmp_path / f"{n}-small.png")
        with Image.open(paths[n]) as image:
            brighter = image.resize((100, 75)).point(lambda v: min(255, int(v * 1.1)))
            brighter.save(paths[-1])
    for n in range(5):  # plain pictures all look alike, which says nothing
        paths.append(tmp_path / f"plain{n}.png")
        Image.new("RGB", (60, 60), (40 * n,) * 3).save(paths[-1])
    prints = [fingerprint(str(path)) for path in paths]
    assert similar_groups(prints) == [[n, 40 + n // 4] for n in range(0, 40, 4)]
    assert equal_groups(prints) == []
    assert similar_groups(prints[:1]) == similar_groups([]) == []


def test_similarity_search_copes_with_many_alike(tmp_path: Path) -> None:
    import dataclasses

    textured(0).save(tmp_path / "a.png")
    print_ = fingerprint(str(tmp_path / "a.png"))
    random = np.random.default_rng(0)
    noisy = [
        dataclasses.replace(
            print_, digest=random.bytes(16), thumb=bytes(np.frombuffer(print_.thumb, np.uint8) ^ (n % 2))
        )
        for n in range(3000)
    ]
    assert similar_groups(noisy) == [list(range(3000))]


def test_pictures_of_one_colour_are_no_duplicates_of_each_other(tmp_path):
    for shade in (0, 90):
        Image.new("RGB", (100, 90), (shade,) * 3).save(tmp_path / f"{shade}.png")
    assert check(data=str(tmp_path)).ok


def test_classes_are_compared_as_runs_compare_them(tmp_path: Path) -> None:
    for name, classes in (("train", ["Dining Table", "cat", "tvmonitor"]), ("val", ["zebra", "dining_table", "tv"])):
        (tmp_path / name).mkdir()
        images, annotations = [], []
        for n in range(len(classes)):
            textured(n + 10 * len(name), 80, 60).save(tmp_path / name / f"{n}.png")
            images.append({"id": n, "file_name": f"{n}.png", "width": 80, "height": 60})
            annotations.append({"id": n, "image_id": n, "category_id": n, "bbox": [5, 5, 50, 50]})
        categories = [{"id": n, "name": label} for n, label in enumerate(classes)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    report = check(CheckConfig(str(tmp_path / "train.json"), val=str(tmp_path / "val.json"), min_labels=0))
    assert {c.name: c.val_boxes for c in report.classes} == {"Dining Table": 1, "cat": 0, "tvmonitor": 1}
    assert {f.kind: f.examples for f in report.findings if f.where == "val"} == {
        "class of data without boxes in val": ["cat"],
        "class unknown to data": ["zebra"],
    }
