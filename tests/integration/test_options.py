"""The verbs' options: each is written down once, and one without effect is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from siamese_detr import VERBS, cli, load_config
from siamese_detr.config import explained, ordered, recipe_names, resolve, write_config
from siamese_detr.errors import UserError
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.pretrain_config import PretrainConfig

REQUIRED: dict[str, dict[str, Any]] = {
    "pretrain": {"images": "photos", "out": "run"},
    "finetune": {"train": "train.json", "out": "run"},
    "propose": {"images": "photos", "out": "store"},
    "evaluate": {"model": "run", "labels": "val.json"},
    "check": {"data": "train.json"},
    "export": {"model": "run", "out": "exported"},
    "demo": {},
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_explained(verb: str) -> None:
    config_class = load_config(verb)
    texts = explained(config_class)
    assert [name for name, (_, text) in texts.items() if not text] == []
    assert set(config_class.COMMON) <= texts.keys()
    first = config_class.COMMON or texts
    assert len(first) <= 13


def test_positions_of_arguments_stay() -> None:
    assert [field.name for field in ordered(PretrainConfig)[:3]] == ["images", "out", "proposals"]
    assert [field.name for field in ordered(FinetuneConfig)[:4]] == ["train", "out", "val", "model"]


@pytest.mark.parametrize(
    ("verb", "beside", "idle", "reason"),
    [
        ("pretrain", {"init": "run"}, {"detector": "detr"}, "the detector is that of run"),
        ("pretrain", {"init": "run"}, {"backbone": "resnet50"}, "the detector is that of run"),
        ("pretrain", {"init": "run"}, {"detector_options": {"dilation": True}}, "the detector is that of run"),
        ("pretrain", {"method": "detreg"}, {"lambda_region": 3.0}, "it is an option of siamese"),
        ("pretrain", {}, {"embedding_weight": 3.0}, "it is an option of detreg"),
        ("pretrain", {"method": "up-detr"}, {"selection": "diverse"}, "random patches"),
        ("pretrain", {"method": "detreg"}, {"iou": 0.3}, "one view"),
        ("pretrain", {"discrimination": "region"}, {"lambda_global": 3.0}, "discrimination is region"),
        ("pretrain", {"region_target": "roi"}, {"crop_size": 64}, "no crops"),
        ("pretrain", {}, {"bank_dir": "banks"}, "feature_bank is 0"),
        ("pretrain", {"proposals": "store"}, {"proposal_method": "random"}, "those of proposals"),
        ("pretrain", {"method": "up-detr"}, {"proposal_method": "selective-search"}, "no proposals are used"),
        ("pretrain", {"schedule": "cosine"}, {"drop_at": 0.5}, "schedule is cosine"),
        ("finetune", {"schedule": "one-cycle"}, {"warmup": 5}, "one-cycle has"),
        ("finetune", {"model": "run"}, {"detector": "detr"}, "the detector is that of run"),
        ("finetune", {"init": "run"}, {"num_queries": 9}, "the detector is that of run"),
        ("finetune", {}, {"val_images": "photos"}, "no validation labels"),
        ("finetune", {}, {"eval_every": 2}, "no validation labels"),
        ("finetune", {}, {"eval_batch_size": 2}, "no validation labels"),
        ("finetune", {"square": True}, {"max_size": 640}, "squares"),
        ("finetune", {}, {"patience": 2}, "no validation labels"),
        ("finetune", {"augment": "strong"}, {"crop": 0.2}, "augment is strong"),
        ("propose", {}, {"seed": 5}, "edge-boxes does not read it"),
        ("evaluate", {}, {"split": "test"}, "a COCO JSON has no splits"),
        ("check", {}, {"split": "test"}, "a COCO JSON has no splits"),
        ("check", {}, {"val_images": "photos"}, "no validation labels"),
        ("export", {}, {"height": 640}, "format is hf"),
        ("export", {"format": "research"}, {"dynamic_batch": False}, "format is research"),
        ("demo", {"images": "photos"}, {"unlabelled": 9}, "your own images"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(
    verb: str,
    beside: dict[str, Any],
    idle: dict[str, Any],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is reported where a configuration file has it, and not recorded. Its default is no mistake."""
    config_class, given = load_config(verb), REQUIRED[verb] | beside
    (name,) = idle
    with pytest.raises(UserError, match=f"{name} has no effect: .*{reason}.*leave it out"):
        resolve(config_class, given | idle)
    file = tmp_path / "options.yaml"
    file.write_text(yaml.safe_dump(idle))
    plain = resolve(config_class, given)
    capsys.readouterr()
    assert resolve(config_class, given, config=file) == plain
    assert f"{name} in {file} has no effect" in capsys.readouterr().err
    assert resolve(config_class, given | {name: getattr(plain, name)}) == plain
    write_config(plain, tmp_path / "written.yaml")
    assert name not in yaml.safe_load((tmp_path / "written.yaml").read_text())
    assert resolve(config_class, {}, config=tmp_path / "written.yaml") == plain


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_recipes_leave_out_what_has_no_effect(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the user changes what it depends on."""
    start = {"init": "run"} if verb == "pretrain" else {"model": "run"}
    for recipe in recipe_names(load_config(verb)):
        config = resolve(load_config(verb), REQUIRED[verb] | start, recipe)
        assert config.num_queries is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", VERBS)
def test_a_printed_configuration_is_read_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.read_arguments(name, load_config(name), ["--print-config"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert "\n# " in file.read_text()
    with pytest.raises(SystemExit):
        cli.read_arguments(name, load_config(name), ["--config", str(file), "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(file.read_text())


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "finetune --recipe laptop" in lines
    assert max(map(len, lines)) <= 80
    assert cli.main(["recipes", "laptop-methods"]) == 0
    text = capsys.readouterr().out
    assert "# siamese-detr compare --recipe laptop-methods" in text
    assert "pretrain_recipe: laptop" in text
    assert cli.main(["recipes", "labtop"]) == 2
    assert "did you mean 'laptop'?" in capsys.readouterr().err
