"""Data sets in memory give what the same data on disk give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import siamese_detr
from siamese_detr.errors import UserError
from siamese_detr.images.labels import read_labels
from tiny_finetuning import CLASSES, QUICK, TINY, learned


def rows(kind):
    """The scenes in memory: Pillow images, arrays or paths, with corners and names."""
    labels = learned()[1]
    content = json.loads(labels.read_text())
    made = []
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        path = labels.with_suffix("") / image["file_name"]
        x, y, width, height = annotation["bbox"]
        name = CLASSES[annotation["category_id"] - 5]
        made.append({"image": kind(path), "boxes": [[x, y, x + width, y + height]], "labels": [name]})
    return made


def pixels(path):
    return np.array(Image.open(path))


@pytest.mark.parametrize("kind", [Image.open, pixels, str, Path])
def test_metrics_are_those_of_the_files(kind):
    result, labels = learned()
    options = {"model": str(result.out), "workers": 0, "quiet": True}
    memory, disk = (siamese_detr.evaluate(labels=data, **options) for data in (rows(kind), str(labels)))
    assert memory.overall() == disk.overall()
    assert memory.ap > 0


def test_training_is_written_once_and_continues(tmp_path):
    out = tmp_path / "run"
    options = {"val": rows(str), "out": str(out), **TINY, **QUICK, "save_every": 1, "quiet": True}
    siamese_detr.finetune(rows(pixels), steps=1, **options)
    siamese_detr.finetune(rows(pixels), steps=2, resume=True, **options)
    (train, val) = sorted((tmp_path / "run-data").iterdir())
    assert (len(list((train / "images").iterdir())), len(list((val / "images").iterdir()))) == (8, 0)
    assert siamese_detr.check(data=str(train), quiet=True).images == {"data": 8}
    with pytest.raises(UserError, match="began with images 8, and now there are 7"):
        siamese_detr.finetune(rows(pixels)[1:], steps=2, resume=True, **options)


def test_pretraining_takes_pictures(tmp_path):
    sizes = {**{k: v for k, v in TINY.items() if k != "num_queries"}, "num_queries": 10}
    result = siamese_detr.pretrain(
        [row["image"] for row in rows(pixels)],
        str(tmp_path / "run"),
        detector="detr",
        backbone="random:test_efficientnet",
        view_size=64,
        crop_size=32,
        batch_size=2,
        steps=1,
        device="cpu",
        workers=0,
        proposal_method="random",
        quiet=True,
        **sizes,
    )
    assert result.steps == 1


class Feature:
    """As Hugging Face's ``ClassLabel`` and ``List``."""

    def __init__(self, names=None, feature=None):
        self.names, self.feature = names, feature


class HuggingFace(list):
    objects = {"bbox": Feature(), "category": Feature(feature=Feature(["cat", "dog"]))}  # noqa: RUF012
    features = {"image": None, "objects": objects}  # noqa: RUF012


def test_hugging_face_data_sets(tmp_path):
    picture = Image.new("L", (40, 30))
    data = HuggingFace(
        [
            {"image": picture, "objects": {"bbox": [[1, 2, 10, 20]], "category": [1]}},
            {"image": picture, "objects": [{"bbox": [3, 4, 5, 6], "category": 1}]},
            {"image": picture, "objects": {"bbox": [], "category": []}},
        ]
    )
    report = siamese_detr.check(data=data, out=str(tmp_path / "report.json"), quiet=True)
    assert [(c.name, c.boxes) for c in report.classes] == [("cat", 0), ("dog", 2)]
    (folder,) = (tmp_path / "report.json-data").iterdir()
    dataset = read_labels(folder)
    assert dataset.images[0].boxes.tolist() == [[1, 2, 11, 22]]


def test_rows_that_lack_something():
    model = str(learned()[0].out)
    for row, message in (
        ({"image": np.zeros((8, 8, 3), np.uint8)}, r"row 0 of labels needs boxes \(N, 4\)"),
        ({"image": "nowhere.png", "boxes": [], "labels": []}, "nowhere.png"),
        ({"boxes": [], "labels": []}, "the image in row 0 of labels is a NoneType"),
        (
            {"image": np.zeros((8, 8, 3), np.uint8), "boxes": [[1, 1, 4, 4]], "labels": []},
            "row 0 of labels needs boxes",
        ),
    ):
        with pytest.raises(UserError, match=message):
            siamese_detr.evaluate(model=model, labels=[row], quiet=True)
    with pytest.raises(UserError, match="labels is a mapping of train, test: give one of its data sets"):
        siamese_detr.evaluate(model=model, labels={"train": [], "test": []}, quiet=True)
    with pytest.raises(UserError, match="labels=3"):
        siamese_detr.evaluate(model=model, labels=3, quiet=True)
