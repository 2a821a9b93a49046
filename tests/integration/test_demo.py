"""The demonstration: every stage of the job, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from siamese_detr import demo
from siamese_detr.errors import UserError
from siamese_detr.scenes import OBJECTS

SMALL = dict(unlabelled=8, labelled=4, validation=3, pretrain_steps=2, finetune_epochs=1)


def test_everything_promised_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    result = demo(out=str(out), **SMALL)
    said = capsys.readouterr().out
    assert "in % (higher is better)" in said
    assert f"{100 * result.pretrained['AP']:.1f}" in said
    for path in ("pictures-pretrained", "pretrained/tensorboard", "finetuned-pretrained/last"):
        assert f"{out}/{path}" in said
        assert any((out / path).iterdir())
    assert len(list((out / "pictures-pretrained" / "pictures").glob("*.jpg"))) == SMALL["validation"]
    width, height = Image.open(out / "side-by-side.jpg").size
    assert width > 900  # three columns
    assert height > 3 * 200  # a row for each of the scenes
    for name, metrics in (("scratch", result.scratch), ("pretrained", result.pretrained)):
        history = [json.loads(line) for line in (out / f"finetuned-{name}" / "history.jsonl").read_text().splitlines()]
        assert metrics["AP"] == history[-1]["AP"]
    starts = [json.loads((out / f"finetuned-{name}" / "start.json").read_text()) for name in ("scratch", "pretrained")]
    assert [start["from"] for start in starts] == ["scratch", str(out / "pretrained" / "detector")]
    assert json.loads((out / "demo.json").read_text())["pretrained"] == result.pretrained
    labels = json.loads((out / "labelled.json").read_text())
    assert [entry["name"] for entry in labels["categories"]] == list(OBJECTS)
    for entry in labels["images"]:
        assert Image.open(out / "labelled" / entry["file_name"]).size == (entry["width"], entry["height"])
    with pytest.raises(UserError, match="already holds a demonstration"):
        demo(out=str(out), **SMALL)


def test_photos_that_are_not_there_are_missed_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        demo(out=str(tmp_path / "demo"), images=str(tmp_path / "nowhere"))
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_refused(photos: Path) -> None:
    before = sorted(photos.iterdir())
    for out in (photos, photos / "0.jpg"):
        with pytest.raises(UserError, match=f"{out} is not an empty folder.*--out"):
            demo(out=str(out))
    assert sorted(photos.iterdir()) == before
