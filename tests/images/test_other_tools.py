"""Label files as other tools write them: read as they were meant, or refused with what would fit. A test per kind."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import textured
from label_files import assert_same_labels, kinds, write_voc, write_yolo
from siamese_detr.errors import UserError
from siamese_detr.images import list_images, read_image, read_labels
from siamese_detr.images.check import check
from siamese_detr.images.problems import turned

Edit = Callable[[dict], Any]


def edited(path: Path, edit: Edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def each(table: str, change: Callable[[dict], Any]) -> Edit:
    """An edit that updates every entry of a table by what ``change`` says of it."""
    return lambda content: [entry.update(change(entry)) for entry in content[table]]


def both(*edits: Edit) -> Edit:
    return lambda content: [edit(content) for edit in edits]


@pytest.mark.parametrize(
    "edit",
    [
        each("annotations", lambda a: {"image_id": str(a["image_id"])}),
        each("images", lambda i: {"id": float(i["id"])}),
        each("annotations", lambda a: {"category_id": str(a["category_id"])}),
        each("categories", lambda c: {"name": f" {c['name']} "}),
        both(
            each("images", lambda i: {"id": i["id"] + 2**60}),
            each("annotations", lambda a: {"image_id": a["image_id"] + 2**60}),
        ),
    ],
)
def test_identifiers_are_names(coco: Path, edit: Edit) -> None:
    expected = read_labels(coco)
    dataset = read_labels(edited(coco, edit))
    assert_same_labels(dataset, expected)
    ids = [image.id for image in dataset.images]
    assert np.array(ids, np.float64).tolist() == ids  # as evaluation passes them on
    assert len(set(ids)) == len(ids)


def test_one_file_under_several_ids_is_one_image(coco: Path) -> None:
    def edit(content: dict) -> None:
        content["images"].append({**content["images"][0], "id": 99})
        content["annotations"].append({"id": 99, "image_id": 99, "category_id": 3, "bbox": [1, 1, 20, 20]})

    boxes = len(read_labels(coco).images[0].boxes)
    dataset = read_labels(edited(coco, edit))
    assert kinds(dataset) == {"one file under several image ids": 1}
    assert len(dataset) == 6
    assert len(dataset.images[0].boxes) == boxes + 1


def test_a_class_that_only_groups_others_is_left_out(coco: Path) -> None:
    def edit(content: dict) -> None:
        content["categories"] = [{**entry, "supercategory": "pets"} for entry in content["categories"]]
        content["categories"].append({"id": 0, "name": "pets", "supercategory": "none"})

    dataset = read_labels(edited(coco, edit))
    assert dataset.class_names == ["cat", "dog"]
    assert kinds(dataset) == {"class that only groups others": 1}


@pytest.mark.parametrize(
    ("on_disk", "in_file"),
    [
        ("photos/{}.jpg", "photos\\{}.jpg"),
        ("Foto {} été.jpg", "Foto%20{}%20%C3%A9t%C3%A9.jpg"),
        ("photos/IMG_{}.JPG", "photos/img_{}.jpg"),
        ("e\u0301te\u0301 {}.jpg", "été {}.jpg"),
        ("photos/{}.jpg", "C:\\Users\\ada\\data\\photos\\{}.jpg"),
        ("photos/{}.jpg", "/home/ada/data/photos/{}.jpg"),
        ("{}.jpg", "images/{}.jpg"),
    ],
)
def test_names_that_travelled_are_found(tmp_path: Path, on_disk: str, in_file: str) -> None:
    entries = []
    for n in range(2):
        file = tmp_path / on_disk.format(n)
        file.parent.mkdir(exist_ok=True)
        textured(n).save(file, "JPEG")
        entries.append({"id": n, "file_name": in_file.format(n)})
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [5, 5, 50, 50]} for n in range(2)]
    labels = {"images": entries, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    dataset = read_labels(tmp_path / "labels.json")
    assert [image.path for image in dataset.images] == [tmp_path / on_disk.format(n) for n in range(2)]
    assert kinds(dataset) == {"file name written differently": 2}
    listed = list_images(tmp_path / "labels.json")
    assert sorted(listed.absolute(n) for n in range(2)) == [str(tmp_path / on_disk.format(n)) for n in range(2)]
    assert len(listed.problems) == 1


def test_a_name_that_two_files_may_have_is_missing(coco: Path, photos: Path) -> None:
    for name in ("A.jpg", "a.JPG"):
        shutil.copy(photos / "0.jpg", photos / name)
    dataset = read_labels(edited(coco, lambda content: content["images"][0].update(file_name="photos/a.jpg")))
    assert kinds(dataset)["missing image"] == 1


def corner_form(box: list[float]) -> list[float]:
    return [box[0], box[1], box[0] + box[2], box[1] + box[3]]


def test_boxes_in_another_convention_are_refused(coco: Path) -> None:
    edit = each("annotations", lambda a: {"bbox": corner_form([a["bbox"][0] + 60, a["bbox"][1] + 20, *a["bbox"][2:]])})
    with pytest.raises(UserError, match=r"9 of 9 .* all fit as two corners, x1 y1 x2 y2 in pixels: convert the boxes"):
        read_labels(edited(coco, edit))


def test_yolo_boxes_in_another_convention_are_refused(coco: Path, tmp_path: Path) -> None:
    dataset = read_labels(coco)
    path = write_yolo(tmp_path / "yolo", dataset)
    forms = {
        "two corners, x1 y1 x2 y2 in parts": lambda x, y, w, h: (x - w / 2, y - h / 2, x + w / 2, y + h / 2),
        "centre, width and height, cx cy w h in pixels": lambda x, y, w, h: (x * 120, y * 120, w * 120, h * 120),
    }
    originals = {file: file.read_text() for file in (tmp_path / "yolo/labels/train").iterdir()}
    for words, form in forms.items():
        for file, text in originals.items():
            lines = [[float(value) for value in line.split()] for line in text.splitlines()]
            shifted = [(c, x + 0.55, y + 0.3, w, h) for c, x, y, w, h in lines]
            rows = [(int(c), *form(*box)) for c, *box in shifted]
            file.write_text("\n".join(" ".join(map(str, row)) for row in rows))
        with pytest.raises(UserError, match=words):
            read_labels(path)


def test_voc_corners_in_another_order_are_refused(coco: Path, tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "voc", read_labels(coco))
    for file in (voc / "Annotations").iterdir():
        text = file.read_text()
        file.write_text(text.replace("xmin", "?").replace("xmax", "xmin").replace("?", "xmax"))
    with pytest.raises(UserError, match=r"all fit as .*two corners in any order in pixels"):
        read_labels(voc)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_stored_pixels_are_turned_with_the_picture(tmp_path: Path, orientation: int) -> None:
    stored = np.full((90, 120, 3), 30, np.uint8)
    stored[10:40, 20:80] = 220  # the box (20, 10, 80, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    labels = {
        "images": [{"id": 1, "file_name": "a.png", "width": 120, "height": 90}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [20, 10, 60, 30]}],
        "categories": [{"id": 1, "name": "bright"}],
    }
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    dataset = read_labels(tmp_path / "labels.json")
    assert kinds(dataset) == {"labels of the picture before its EXIF turn": 1}
    (image,) = dataset.images
    assert (image.width, image.height) == (90, 120)
    rows, columns = np.nonzero(read_image(image.path)[..., 0] > 128)
    assert image.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]
    assert turned(np.array([[20, 10, 80, 40]]), 120, 90, orientation).tolist() == image.boxes.tolist()


def test_labels_of_a_copy_of_another_size_are_scaled(coco: Path) -> None:
    dataset = read_labels(edited(coco, each("images", lambda i: {"width": 2 * i["width"], "height": 2 * i["height"]})))
    assert kinds(dataset) == {"labels of a larger or smaller copy": 6}


def polygon(box: list[float]) -> list[list[float]]:
    x1, y1, x2, y2 = corner_form(box)
    return [[x1, y1, x2, y1, x2, y2, x1, y2]]


def run_lengths(box: list[float], width: int, height: int) -> dict:
    """COCO's uncompressed RLE of a filled box: column by column, alternately off and on."""
    mask = np.zeros((height, width), bool)
    x1, y1, x2, y2 = map(int, corner_form(box))
    mask[y1:y2, x1:x2] = True
    flat = mask.T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [height, width], "counts": np.diff([0, *edges, len(flat)]).tolist()}


@pytest.mark.parametrize("kind", ["polygon", "run lengths"])
def test_masks_without_boxes_give_the_box_around_them(coco: Path, kind: str) -> None:
    expected = read_labels(coco)
    sizes = {image.id: (image.width, image.height) for image in expected.images}

    def mask(entry: dict) -> dict:
        box, size = entry.pop("bbox"), sizes[entry["image_id"]]
        return {"segmentation": polygon(box) if kind == "polygon" else run_lengths(box, *size)}

    assert_same_labels(read_labels(edited(coco, each("annotations", mask))), expected)


def test_the_pictures_of_renamed_xml_files(coco: Path, tmp_path: Path) -> None:
    expected = read_labels(coco)
    voc = write_voc(tmp_path / "voc", expected)
    files = sorted((voc / "Annotations").iterdir())
    for file, other in zip(files, [*files[1:], files[0]], strict=True):
        text = file.read_text()
        file.write_text(re.sub("<filename>.*</filename>", f"<filename>{other.stem}.jpg</filename>", text))
    dataset = read_labels(voc)
    assert kinds(dataset) == {"file name in the XML differs from the XML's": 6}
    assert_same_labels(dataset, expected)


@pytest.mark.parametrize("form", ["flat", "sub-folders", "pictures elsewhere"])
def test_voc_folders_of_other_tools(coco: Path, tmp_path: Path, form: str) -> None:
    expected = read_labels(coco)
    voc = write_voc(tmp_path / "voc", expected)
    for file in [*(voc / "Annotations").iterdir(), *(voc / "JPEGImages").iterdir()]:
        camera = "camA" if int(file.stem) % 2 else "camB"
        place = {"flat": voc / "flat", "sub-folders": file.parent / camera}.get(form, file.parent)
        if form == "pictures elsewhere" and file.suffix == ".jpg":
            place = file.parent / camera
        place.mkdir(exist_ok=True)
        file.rename(place / file.name)
    (voc / "ImageSets/Main/train.txt").write_text(
        "camB/0\ncamA/1.jpg\n2 -1\n" if form == "sub-folders" else "0\n1\n2\n"
    )
    dataset = read_labels(voc / "flat" if form == "flat" else voc)
    assert {image.path.name for image in dataset.images} == {image.path.name for image in expected.images}
    assert not dataset.problems
    assert dataset.class_counts().tolist() == expected.class_counts().tolist()
    if form != "flat":
        assert {image.path.name for image in read_labels(voc, split="train").images} == {"0.jpg", "1.jpg", "2.jpg"}


def test_voc_lists_with_blanks_in_names(coco: Path, tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "voc", read_labels(coco))
    for folder, ending in (("Annotations", "xml"), ("JPEGImages", "jpg")):
        (voc / folder / f"0.{ending}").rename(voc / folder / f"my photo 1.{ending}")
    (voc / "ImageSets/Main/train.txt").write_text("my photo 1\n1\n")
    assert [image.path.name for image in read_labels(voc, split="train").images] == ["1.jpg", "my photo 1.jpg"]


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_roboflow_folders_know_their_splits(coco: Path, photos: Path, tmp_path: Path, kind: str) -> None:
    root = tmp_path / "export"
    for split in ("train", "valid"):
        if kind == "coco":
            shutil.copytree(photos, root / split)
            content = coco.read_text().replace("photos/", "")
            (root / split / "_annotations.coco.json").write_text(content)
        else:
            voc = write_voc(tmp_path / split, read_labels(coco))
            (root / split).mkdir(parents=True)
            for file in [*(voc / "Annotations").iterdir(), *(voc / "JPEGImages").iterdir()]:
                file.rename(root / split / file.name)
    assert len(read_labels(root)) == 6
    assert read_labels(root, default_split="val").root == root / "valid"
    assert set(check(str(root)).images) == {"data", "val"}
    with pytest.raises(UserError, match="has labels of train, val, but none of test"):
        read_labels(root, split="test")


def test_darknet_and_label_studio_folders(coco: Path, tmp_path: Path) -> None:
    expected = read_labels(coco)
    root = write_yolo(tmp_path / "yolo", expected).parent
    (root / "data.yaml").unlink()
    (root / "obj.names").write_text("\n".join(expected.class_names) + "\n")
    (root / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\nbackup = backup/\n")
    names = sorted(file.name for file in (root / "images/train").iterdir())
    (root / "train.txt").write_text("\n".join(f"data/images/train/{name}" for name in names))
    part = read_labels(root)
    assert [image.path.name for image in part.images] == names
    assert part.class_counts().tolist() == read_labels(root / "obj.data").class_counts().tolist()
    for file in ("obj.data", "train.txt"):
        (root / file).unlink()
    (root / "obj.names").rename(root / "classes.txt")
    (root / "notes.json").write_text('{"categories": []}')
    whole = read_labels(root)
    assert whole.class_counts().tolist() == expected.class_counts().tolist()
    with pytest.raises(UserError, match="no split 'val'"):
        read_labels(root, split="val")


def test_yolo_lines_with_more_than_a_box(coco: Path, tmp_path: Path) -> None:
    expected = read_labels(write_yolo(tmp_path / "plain", read_labels(coco)))
    path = write_yolo(tmp_path / "yolo", read_labels(coco))
    originals = {file: file.read_text() for file in (tmp_path / "yolo/labels/train").iterdir()}

    def rewrite(line: Callable[[list[str]], str]) -> None:
        for file, text in originals.items():
            file.write_text("\n".join(line(row.split()) for row in text.splitlines()))

    rewrite(lambda row: " ".join(row).replace(".", ","))
    assert set(kinds(read_labels(path))) == {"decimal comma"}
    assert_same_labels(read_labels(path), expected)
    rewrite(lambda row: ",".join(row))
    assert_same_labels(read_labels(path), expected)
    rewrite(lambda row: " ".join([*row, "0.87"]))  # a score
    assert not read_labels(path).problems
    assert {score for image in read_labels(path).images for score in image.scores} == {np.float32(0.87)}
    for track in ("1", "17"):
        rewrite(lambda row, track=track: " ".join([*row, track]))
        assert set(kinds(read_labels(path))) == {"number after the box"}
        assert all(np.isnan(image.scores).all() for image in read_labels(path).images)
        assert_same_labels(read_labels(path), expected)

    rewrite(lambda row: " ".join([*row, row[1], row[2], row[1], str(float(row[2]) + 0.01)]))
    with pytest.raises(UserError, match=r"2 key points .* add the line kpt_shape: \[2, 2\]"):
        read_labels(path)
    edited(path, lambda content: content.update(kpt_shape=[2, 2]))
    assert_same_labels(read_labels(path), expected)

    def oriented(row: list[str]) -> str:
        x, y, w, h = map(float, row[1:])
        turn = [math.pi / 4 + k * math.pi / 2 for k in range(4)]  # the corners of a diamond inside the box
        points = [(x + w / 2 * math.cos(t - math.pi / 4), y + h / 2 * math.sin(t - math.pi / 4)) for t in turn]
        return " ".join([row[0], *(f"{value:.6f}" for point in points for value in point)])

    edited(path, lambda content: content.pop("kpt_shape"))
    rewrite(oriented)
    assert_same_labels(read_labels(path), expected, tolerance=0.01)


def test_pictures_that_are_not_read_are_counted(photos: Path) -> None:
    (photos / "raw.NEF").write_bytes(b"raw")
    (photos / "picture.jxl").write_bytes(b"jxl")
    listed = list_images(photos)
    assert len(listed) == 6
    assert "2 pictures of formats that are not read (1 .nef, 1 .jxl" in listed.problems[0]
    (photos / "renamed.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match="HEIC"):
        read_image(photos / "renamed.jpg")
