"""VOC folders and YOLO data sets: what they may look like, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import textured
from label_files import assert_same_labels, kinds, write_voc, write_yolo
from siamese_detr.errors import UserError
from siamese_detr.images import read_labels
from siamese_detr.images.labels import has_split


def test_voc_details(coco: Path, tmp_path: Path) -> None:
    voc = write_voc(tmp_path / "voc", read_labels(coco))
    annotations = voc / "Annotations"
    (annotations / "0.xml").write_text(
        "<annotation><filename>renamed.png</filename><size><width>0</width><height>0</height></size>"
        "<object><name>zebra</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>120</xmax><ymax>160</ymax></bndbox></object>"
        "<object><name>zebra</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox></object>"
        "<object><name></name></object><object/></annotation>"
    )
    (annotations / "1.xml").write_text("<annotation><object>")
    (annotations / "2.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b "boom"><!ENTITY c "&b;&b;">]><annotation><filename>&c;</filename></annotation>'
    )
    (annotations / "3.xml").write_bytes(b"\xff\xfe<\0a\0")
    dataset = read_labels(voc)
    differs = "file name in the XML differs from the XML's"
    assert kinds(dataset) == {"unreadable label file": 3, "malformed box": 3, differs: 1}
    assert any("DOCTYPE" in example for problem in dataset.problems for example in problem.examples)
    assert dataset.class_names == ["cat", "dog", "zebra"]
    # The picture of the same name stands in for the missing one, its own size for the zeros.
    assert (dataset.images[0].path.name, dataset.images[0].width, dataset.images[0].height) == ("0.jpg", 120, 160)
    assert dataset.images[0].boxes.tolist() == [[0, 0, 120, 160]]
    # The classes are the folder's, whatever the split: train and val agree.
    assert read_labels(voc, split="val").class_names == ["cat", "dog", "zebra"]
    with pytest.raises(UserError, match=r"splits are train, val"):
        read_labels(voc, split="test")
    (voc / "ImageSets/Main/alien.txt").write_text("000001\n")
    with pytest.raises(UserError, match="none of the images of split 'alien'"):
        read_labels(voc, split="alien")
    for year in ("VOC2007", "VOC2012"):
        (tmp_path / "VOCdevkit" / year / "Annotations").mkdir(parents=True)
    with pytest.raises(UserError, match=r"VOC folders: name one \(VOC2007, VOC2012\)"):
        read_labels(tmp_path / "VOCdevkit")
    (voc / "JPEGImages").rename(voc / "elsewhere")
    with pytest.raises(UserError, match="JPEGImages"):
        read_labels(voc)


def test_yolo_details(coco: Path, tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "yolo", read_labels(coco), names={7: "dog", 3: "cat"})
    labels = tmp_path / "yolo/labels/train"
    (labels / "0.txt").write_text(
        "3 0.5 0.5 0.5 0.5\n\n7 0.1 0.1 0.5 0.1 0.5 0.6 0.2 0.3\n3 0.5 0.5 0.5 0.5\n3 0.5 0.5\n"
        "3.5 .5 .5 .1 .1\nx 1 1 1 1\n3 nan 0.5 0.5 0.5\n4 0.5 0.5 0.5 0.5\n3 1.0 0.5 0.5 0.5\n"
        "3 1.5 0.5 0.5 0.5\n3 0.5 0.5 0 0.5\n"
    )
    (labels / "1.txt").unlink()
    (labels / "2.txt").write_bytes(b"\xff\xfe\x80")
    (labels / "3.txt").write_text("")
    dataset = read_labels(path)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.category_ids == [3, 7]
    assert [i.path.name for i in dataset.images] == ["0.jpg", "1.jpg", "3.jpg"]
    boxes = dataset.images[0].boxes
    np.testing.assert_allclose(boxes, [[30, 40, 90, 120], [12, 16, 60, 96], [90, 40, 120, 120]], atol=1e-4)
    assert dataset.images[0].classes.tolist() == [0, 1, 0]
    assert kinds(dataset) == {
        "malformed box": 4,
        "repeated box": 1,
        "box of an unknown class": 1,
        "box partly outside the image": 1,
        "box outside the image": 1,
        "box of zero size": 1,
        "missing label file": 1,
        "unreadable label file": 1,
    }


def test_what_is_not_listed_of_yolo_images_is_reported(coco: Path, tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "yolo", read_labels(coco))
    (tmp_path / "yolo/images/train/more").symlink_to("more")
    (problem,) = read_labels(path).problems
    assert (problem.kind, problem.count) == ("images not listed", 1)
    assert "train/more: Too many levels of symbolic links" in problem.examples[0]


def test_yolo_paths(coco: Path, tmp_path: Path) -> None:
    expected = read_labels(write_yolo(tmp_path / "yolo", read_labels(coco)))
    names = "names: [cat, dog]\n"
    lists = "".join(f"./images/train/{n}.jpg\n" for n in range(4))
    (tmp_path / "yolo/train.txt").write_text(lists)
    (tmp_path / "config").mkdir()
    for folder, content in {
        "yolo": "train: ../images/train\n",  # as some exporters write it
        "config": "path: ../yolo\ntrain: images/train\n",
        "": f"path: {tmp_path}/yolo\ntrain: [images/train]\n",
        "yolo/images": "train: train\n",
        "yolo/": "train: train.txt\n",
    }.items():
        path = tmp_path / folder / "some.yaml"
        path.write_text(names + content)
        assert_same_labels(expected, read_labels(path))
    beside = tmp_path / "beside"  # no folder called images: labels lie beside the pictures
    beside.mkdir()
    textured(0).save(beside / "a.jpg")
    (beside / "a.txt").write_text("1 0.5 0.5 0.5 0.5")
    (tmp_path / "beside.yaml").write_text(names + "train: beside\n")
    assert len(read_labels(tmp_path / "beside.yaml").images[0].boxes) == 1


def test_splits_that_are_there(coco: Path, tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "yolo", read_labels(coco))
    assert [has_split(path, split) for split in ("train", "val", "test")] == [True, True, False]
    (tmp_path / "yolo/images/val").rename(tmp_path / "elsewhere")
    assert not has_split(path, "val")
    assert not has_split(coco, "val")
    assert not has_split(tmp_path / "nowhere", "val")


BOMB = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 31))  # a billion leaves


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not valid YAML"),
        ("", "no 'names'"),
        ("a: 1", "no 'names'"),
        ("names: []\ntrain: images/train", "'names' must be"),
        ("names: cat\ntrain: images/train", "'names' must be"),
        ("names: [cat, cat]\ntrain: images/train", "'names' must be"),
        ("names: [cat, [dog]]\ntrain: images/train", "'names' must be"),
        ("names: {a: b}\ntrain: images/train", "'names' must be"),
        ("names: [cat]\nval: images/val", "no split 'train': it has val"),
        ("names: [cat]\ntrain: 5", "must name a folder"),
        ("names: [cat]\ntrain: nowhere", "does not exist"),
        ("names: [cat]\ntrain: pictures", "no image in"),
        ("names: !!python/object/apply:os.system ['true']\ntrain: images/train", "not valid YAML"),
        ("names: [cat]\ntrain: images/unlabelled", "has a label file"),
        ("names: &a [*a]\ntrain: images/train", "'names' must be"),
        (BOMB + "names: *a30\ntrain: images/train", "'names' must be"),
    ],
)
def test_unusable_yolo(coco: Path, tmp_path: Path, content: str, message: str) -> None:
    root = write_yolo(tmp_path / "yolo", read_labels(coco)).parent
    (root / "pictures").mkdir()
    (root / "images/unlabelled").mkdir()
    textured(0).save(root / "images/unlabelled/a.jpg")
    (root / "data.yaml").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_labels(root / "data.yaml")
    assert "\n" not in str(caught.value)
