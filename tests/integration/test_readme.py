"""The README's commands do what they say, typed as they stand: only recipes are smaller, and the data is made up."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from siamese_detr import cli
from tiny_finetuning import QUICK, TINY, write_scenes

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SIZES = {**TINY, "detector": "rt-detr", "hidden_size": 32}
RECIPES = {
    "pretrain": SIZES
    | {"view_size": 96, "crop_size": 32, "num_regions": 3, "feature_bank": 1, "batch_size": 4, "steps": 2},
    "finetune": SIZES | QUICK | {"steps": 3, "ema": 0.9, "eval_every": 0.5, "kept_share": 0.5},
    "compare": {"inits": ["backbone", "siamese"], "fractions": [1.0], "seeds": [0]},
}


def commands(title: str) -> list[list[str]]:
    """The commands of the shell block of the section of that title."""
    block = re.search(rf"^## {title}$.*?^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for folder, seed in (("photos", 2), ("new-photos", 3)):
        write_scenes(tmp_path / folder, 8, seed=seed).unlink()
    for verb, values in RECIPES.items():
        own = {f"{name}_recipe": f"{name}.yaml" for name in ("pretrain", "finetune")} if verb == "compare" else {}
        (tmp_path / f"{verb}.yaml").write_text(yaml.safe_dump(values | own))
    return tmp_path


@pytest.fixture
def run(place: Path) -> Callable[[list[str]], None]:
    def type_(words: list[str]) -> None:
        verb, *rest = words
        if verb == "export" and importlib.util.find_spec("onnxscript") is None:
            return
        typed = [verb, *(f"{verb}.yaml" if word == "laptop" else word for word in rest)]
        assert cli.main(typed) == 0, shlex.join(words)

    return type_


def test_your_own_photos(place: Path, run: Callable[[list[str]], None]) -> None:
    """From YOLO files: ``data.yaml`` names the validation split."""
    for split, seed in (("train", 0), ("val", 1)):
        document = json.loads(write_scenes(place / "images" / split, 8, seed=seed).read_text())
        (place / "labels" / split).mkdir(parents=True)
        for image, annotation in zip(document["images"], document["annotations"], strict=True):
            (x, y, w, h), width, height = annotation["bbox"], image["width"], image["height"]
            shares = (x + w / 2) / width, (y + h / 2) / height, w / width, h / height
            text = " ".join(map(str, (annotation["category_id"] - 5, *shares)))
            (place / "labels" / split / f"{image['id']}.txt").write_text(text + "\n")
    description = {"train": "images/train", "val": "images/val", "names": ["stripes", "dots"]}
    (place / "data.yaml").write_text(yaml.safe_dump(description))
    for words in commands("Your own photos"):
        run(words)
    assert len(json.loads((place / "runs/pictures/predictions.json").read_text())["images"]) == 8
    assert (place / "runs/detector/best/model.safetensors").is_file()


def test_all_verbs(place: Path, run: Callable[[list[str]], None]) -> None:
    for name, seed in (("train", 0), ("val", 1)):
        write_scenes(place / "labels" / name, 8, seed=seed)
    for words in commands("All verbs"):
        run(words)
    written = {path.name for path in (place / "runs").iterdir()}
    assert written >= {"proposals", "pretrained", "detector", "self-trained", "pictures", "comparison"}
    assert (place / "runs/comparison/report.html").is_file()
