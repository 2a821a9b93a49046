"""The verb ``pretrain`` through its public face, at the smallest sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from conftest import slow, textured
from runs import TINY, logged
from siamese_detr import cli
from siamese_detr.config import read_sources, recipe_names, validate
from siamese_detr.detectors import plan_detector
from siamese_detr.detectors.structures import OF_NEW
from siamese_detr.errors import UserError
from siamese_detr.pretext import PRETEXTS
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.proposals.store import ProposalStore
from siamese_detr.runtime.processes import Team, machine_explained
from siamese_detr.runtime.rundir import sessions
from siamese_detr.training import pretrain as module
from siamese_detr.training.feature_bank import FeatureBank, fingerprint
from siamese_detr.training.loop import Loop
from siamese_detr.training.optimizer import lr_factor
from siamese_detr.training.pretrain import pretrain
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.training.source import find_source
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.sampler import ViewBatchSampler
from siamese_detr.views.two_views import TwoViewDataset

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a tiny run on 10 images with their proposals."""
    root = tmp_path_factory.mktemp("pretrain")
    (root / "photos").mkdir()
    for n in range(10):
        textured(n, *((120, 90) if n % 3 else (90, 120))).save(root / "photos" / f"{n:02}.jpg")
    propose(images=str(root / "photos"), out=str(root / "store"), method="random", workers=1)
    return TINY | {"images": str(root / "photos"), "proposals": str(root / "store"), "steps": 4}


def saved(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")


def with_photos(base: dict[str, Any], tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of the photos with proposals of its own, which a test may damage, and the options of a run on it."""
    photos, store = tmp_path / "photos", str(tmp_path / "store")
    shutil.copytree(base["images"], photos)
    propose(images=str(photos), out=store, method="random", workers=1)
    return photos, {**base, "images": str(photos), "proposals": store}


def test_a_run_leaves_what_it_promises(base: dict[str, Any], tmp_path: Path) -> None:
    """Config, logs of every term, checkpoints, and a detector that Transformers loads alone; proposals made first."""
    out = tmp_path / "run"
    result = pretrain(
        **{
            **base,
            "out": str(out),
            "proposals": None,
            "proposal_method": "random",
            "device": "auto",
            "precision": "bf16",
            "accumulate": 2,
        }
    )
    assert result.steps == 4
    assert result.detector == out / "detector"
    assert np.isfinite(result.loss)
    names = {"loss", "loss_class", "loss_box", "loss_giou", "loss_region", "loss_global", "grad_norm", "learning_rate"}
    names |= {"padded_regions"}
    assert all(names <= record.keys() for record in logged(out))
    assert list((out / "proposals").glob("shard-*"))
    assert list((out / "tensorboard").iterdir())
    session = json.loads((out / "sessions.jsonl").read_text())
    assert (session["images"], session["packages"]["torch"]) == (10, torch.__version__.split("+")[0])
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()} - {""}
    assert not kinds & {".pt", ".pth", ".bin", ".pkl"}
    model = AutoModelForObjectDetection.from_pretrained(out / "detector")
    trained = saved(out, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"detector.model.{name}"]), name
    again = pretrain(config=str(out / "config.yaml"), resume=True)  # complete: nothing is done
    assert again.steps == 4


def test_the_frozen_stay_frozen_and_all_else_learns(base: dict[str, Any], tmp_path: Path) -> None:
    """Backbone, its statistics and the class head are bit-identical after training; every other parameter moved."""
    out = tmp_path / "run"
    pretrain(**{**base, "out": str(out), "save_every": 1, "keep": 0})
    first, last = saved(out, 1), saved(out, 4)
    frozen = [name for name in first if ".backbone." in name or "class_labels_classifier" in name]
    assert len(frozen) > 10
    assert all(torch.equal(first[name], last[name]) for name in frozen)
    stuck = [name for name in first.keys() - set(frozen) if torch.equal(first[name], last[name])]
    assert stuck == []


@pytest.mark.promise("same-inputs")
def test_a_longer_run_begins_as_the_shorter_one(base: dict[str, Any], tmp_path: Path) -> None:
    """More steps and another logging interval may be asked for on resume; settings that change updates may not."""
    options = {**base, "schedule": "constant"}
    pretrain(**{**options, "out": str(tmp_path / "long"), "steps": 6})
    short = {**options, "out": str(tmp_path / "short")}
    pretrain(**{**short, "steps": 3})
    with pytest.raises(UserError, match=r"lr: 0\.001 -> 0\.5"):
        pretrain(**{**short, "lr": 0.5, "resume": True})
    with pytest.raises(UserError, match=r"already holds a run.*--resume"):
        pretrain(**short)
    pretrain(**{**short, "steps": 6, "log_every": 2, "save_every": 5, "resume": True})
    long, both = logged(tmp_path / "long"), logged(tmp_path / "short")
    assert both[:3] == long[:3]
    assert [record["step"] for record in both] == [1, 2, 3, 4, 6]
    assert both[-1]["loss"] == pytest.approx((long[4]["loss"] + long[5]["loss"]) / 2, rel=1e-12)
    checkpoints = {path.name for path in (tmp_path / "short" / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-5", "checkpoint-6"}
    assert all(torch.equal(saved(tmp_path / "long", 6)[k], v) for k, v in saved(tmp_path / "short", 6).items())


@pytest.mark.promise("bad-images")
def test_what_the_list_of_images_leaves_out_is_told(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Proposals given, so that nobody else says it."""
    photos, own = with_photos(base, tmp_path)
    (photos / "more.tar.gz").write_bytes(b"")
    pretrain(**{**own, "out": str(tmp_path / "run"), "steps": 1})
    assert "left out: " in (said := capsys.readouterr().err)
    assert "more.tar.gz" in said


def test_a_directory_of_something_else_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="holds no run"):
        pretrain(**{**base, "out": str(tmp_path), "resume": True})


def test_a_run_is_not_continued_on_other_images(base: dict[str, Any], tmp_path: Path) -> None:
    options = {**base, "out": str(tmp_path / "run"), "steps": 1, "proposals": str(tmp_path / "store")}
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(5):
        textured(n).save(photos / f"{n}.jpg")
        if n > 2:
            propose(images=str(photos), out=str(tmp_path / "store"), method="random", workers=1)
            if n == 3:
                pretrain(**{**options, "images": str(photos)})
    with pytest.raises(UserError, match="began with images 4, and now there are 5"):
        pretrain(**{**options, "images": str(photos), "steps": 2, "resume": True})


@pytest.mark.promise("same-inputs")
def test_a_run_is_not_continued_on_as_many_other_images_or_other_boxes(base: dict[str, Any], tmp_path: Path) -> None:
    """One picture less and one more; proposals of another seed. Moved with its pictures, the run goes on."""
    photos = tmp_path / "photos"
    shutil.copytree(base["images"], photos)

    def store(name: str, **options: Any) -> str:
        propose(images=str(photos), out=str(tmp_path / name), method="random", workers=1, **options)
        return str(tmp_path / name)

    base = base | {"schedule": "constant"}
    options = {**base, "images": str(photos), "proposals": store("first"), "out": str(tmp_path / "run")}
    pretrain(**{**options, "steps": 2})
    with pytest.raises(UserError, match="began with other proposals"):
        pretrain(**{**options, "proposals": store("second", seed=1), "resume": True})
    (photos / "03.jpg").rename(photos / "99.jpg")
    with pytest.raises(UserError, match=r"began with other images \(as many\)"):
        pretrain(**{**options, "proposals": store("third"), "resume": True})
    (photos / "99.jpg").rename(photos / "03.jpg")
    shutil.move(photos, tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    photos = tmp_path / "elsewhere"
    moved = {"images": str(photos), "proposals": store("fourth"), "out": str(tmp_path / "copy"), "resume": True}
    pretrain(**{**options, **moved})
    pretrain(**{**base, "out": str(tmp_path / "whole")})
    assert logged(tmp_path / "copy") == logged(tmp_path / "whole")


@pytest.mark.promise("same-inputs")
def test_a_run_with_proposals_of_its_own_goes_on_when_its_images_moved(base: dict[str, Any], tmp_path: Path) -> None:
    for name in ("photos", "whole"):
        shutil.copytree(base["images"], tmp_path / name)
    options = {**base, "proposals": None, "schedule": "constant", "batch_size": 5, "max_bad_share": 0.1}
    options["proposal_method"] = "random"
    for name in ("run", "uncut"):  # one image becomes unreadable after its boxes were computed
        images = tmp_path / {"run": "photos", "uncut": "whole"}[name]
        propose(images=str(images), out=str(tmp_path / name / "proposals"), method="random", workers=1)
        (images / "03.jpg").write_bytes(b"gone")
    pretrain(**{**options, "images": str(tmp_path / "photos"), "out": str(tmp_path / "run"), "steps": 2})
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    moved = {"images": str(tmp_path / "elsewhere"), "out": str(tmp_path / "run"), "resume": True}
    assert pretrain(**{**options, **moved}).skipped == 1
    pretrain(**{**options, "images": str(tmp_path / "whole"), "out": str(tmp_path / "uncut")})
    assert logged(tmp_path / "run") == logged(tmp_path / "uncut")
    with pytest.raises(UserError, match="has done 4 updates already"):
        pretrain(**{**options, **moved, "steps": 3})


@pytest.mark.promise("checkpoints")
def test_a_run_whose_checkpoints_vanished_is_not_begun_anew(base: dict[str, Any], tmp_path: Path) -> None:
    """It would write over what is left of the run: the log, and the detector of many more steps."""
    out = tmp_path / "run"
    options = {**base, "out": str(out), "schedule": "constant", "resume": True}
    pretrain(**options)
    (out / "checkpoints").rename(tmp_path / "elsewhere")
    before = {path: path.read_bytes() for path in (out / "log.jsonl", out / "detector" / "model.safetensors")}
    with pytest.raises(UserError, match=r"no checkpoint is left in .*checkpoints, .*step 4.*bring them back"):
        pretrain(**{**options, "steps": 6})
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "elsewhere").rename(out / "checkpoints")
    assert pretrain(**{**options, "steps": 6}).steps == 6


@pytest.mark.promise("same-inputs")
def test_the_order_of_a_stores_rows_does_not_matter(base: dict[str, Any], tmp_path: Path) -> None:
    """Proposals made anew, of the later half of the pictures first: the run goes on to the same bits."""
    photos, own = with_photos(base, tmp_path)
    own |= {"schedule": "constant", "out": str(tmp_path / "run")}
    pretrain(**{**own, "steps": 2})
    again = {"out": str(tmp_path / "again"), "method": "random", "workers": 1}
    later = photos / "later.txt"
    later.write_text("\n".join(str(photos / f"{n:02}.jpg") for n in range(5, 10)))
    for images in (later, photos):
        propose(images=str(images), **again)
    assert ProposalStore.open(tmp_path / "again").paths()[0].as_py() == "05.jpg"
    pretrain(**{**own, "proposals": again["out"], "steps": 4, "resume": True})
    pretrain(**{**base, "schedule": "constant", "out": str(tmp_path / "whole")})
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    assert all(torch.equal(saved(tmp_path / "run", 4)[k], v) for k, v in saved(tmp_path / "whole", 4).items())


class Poison(SiamesePretext):
    """Gives a NaN from step 3 on: in the loss, or only in the gradient of one bias."""

    where = "loss"
    calls = 0

    def forward(self, features: Any) -> Any:
        output = super().forward(features)
        Poison.calls += 1
        if Poison.calls >= 3 and self.where == "loss":
            output.loss = output.loss * float("nan")
        if Poison.calls >= 3 and self.where == "gradient":
            output.loss = output.loss + 0 * (self.region_embedding.bias.sum() * 0).sqrt()
        if Poison.calls >= 3 and self.where == "matching":
            with torch.no_grad():
                self.class_head.bias.fill_(float("inf"))
            super().forward(features)
        return output


@pytest.mark.parametrize("where", ["loss", "gradient", "matching"])
@pytest.mark.promise("non-finite")
def test_a_nan_stops_before_the_update(
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """State before the step is kept, the samples are named, and one command does the step again."""
    monkeypatch.setattr(module, "build_pretext", lambda method, detector, config: Poison(detector, config))
    monkeypatch.setattr(Poison, "where", where)
    monkeypatch.setattr(Poison, "calls", 0)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step 3: stopped before the update.*--replay") as stopped:
        pretrain(**{**base, "out": str(out), "save_every": 1, "keep": 0})
    document = json.loads((out / "nonfinite.json").read_text())
    assert (document["step"], len(document["samples"]), len(document["samples"][0])) == (2, 1, 4)
    if where == "gradient":
        assert document["parameters"] == ["region_embedding.bias"]
    state = load_file(out / "nonfinite" / "checkpoint-2" / "model.safetensors")
    if where != "matching":
        before = {name: value for name, value in saved(out, 2).items() if "running" not in name and "num_b" not in name}
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert not (out / "checkpoints" / "checkpoint-3").exists()

    words = shlex.split(str(stopped.value).rpartition(" with: ")[2])
    assert words[:2] == ["siamese-detr", "pretrain"]
    Poison.calls = 2
    assert cli.main(words[1:]) == 0
    assert capsys.readouterr().out.startswith("step 3: ")
    Poison.calls = 2
    result = pretrain(**{**base, "out": str(out), "replay": str(out / "nonfinite.json")})
    assert result.replay.startswith("step 3: ")
    assert {"loss": "nan", "gradient": "SqrtBackward", "matching": "class_head"}[where] in result.replay
    Poison.calls = -100
    if where != "matching":
        assert "no update made" in pretrain(**{**base, "out": str(out), "replay": str(out / "nonfinite.json")}).replay


@pytest.mark.promise("bad-images")
def test_unreadable_images_are_listed_and_limited(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped, told of, counted and listed once, with reasons; too many of them, or no others, end the run."""
    photos, own = with_photos(base, tmp_path)
    options = {**own, "workers": 1}
    (photos / "03.jpg").write_bytes(b"\xff\xd8 no longer an image")
    result = pretrain(**{**options, "out": str(tmp_path / "some"), "max_bad_share": 0.1, "epochs": 4, "steps": None})
    (record,) = [json.loads(line) for line in (tmp_path / "some" / "skipped.jsonl").read_text().splitlines()]
    assert result.skipped == 1
    assert record["path"].endswith("03.jpg")
    assert record["reason"]
    assert capsys.readouterr().err.count("03.jpg") == 1
    with pytest.raises(UserError, match=r"1 of 10 images cannot be read.*max_bad_share 0.01"):
        pretrain(**{**options, "out": str(tmp_path / "few"), "max_bad_share": 0.01, "steps": 8})
    for file in photos.iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(UserError, match=r"none of the last 12 images can be read.*is the disk still mounted"):
        pretrain(**{**options, "out": str(tmp_path / "none"), "max_bad_share": 1.0})


@pytest.mark.promise("bad-images")
def test_mended_images_are_taken_when_a_run_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
    photos, own = with_photos(base, tmp_path)
    good = (photos / "03.jpg").read_bytes()
    (photos / "03.jpg").write_bytes(b"gone")
    options = {**own, "out": str(tmp_path / "run"), "max_bad_share": 0.05, "steps": 8, "save_every": 1}
    with pytest.raises(UserError, match="1 of 10 images cannot be read"):
        pretrain(**options)
    with pytest.raises(UserError, match="1 of 10 images cannot be read"):
        pretrain(**options, resume=True)
    (photos / "03.jpg").write_bytes(good)
    result = pretrain(**options, resume=True)
    assert (result.steps, result.skipped) == (8, 0)

    textured(3, 60, 90).save(photos / "03.jpg")  # of another size than its boxes are for: readable, of no use
    options |= {"out": str(tmp_path / "odd"), "max_bad_share": 0.1, "schedule": "constant"}
    pretrain(**{**options, "steps": 6})
    assert pretrain(**options, resume=True).skipped == 1


@pytest.mark.promise("bad-images")
def test_a_run_with_its_own_proposals_goes_on_with_its_images(base: dict[str, Any], tmp_path: Path) -> None:
    photos, own = with_photos(base, tmp_path)
    good = (photos / "03.jpg").read_bytes()
    (photos / "03.jpg").write_bytes(b"gone")
    options = {**own, "proposals": None, "proposal_method": "random", "out": str(tmp_path / "run")}
    pretrain(**{**options, "steps": 2})
    (photos / "03.jpg").write_bytes(good)
    pretrain(**options, resume=True)
    (photos / "04.jpg").write_bytes(b"gone")
    propose(images=str(photos), out=str(tmp_path / "anew" / "proposals"), method="random", workers=1)
    (photos / "04.jpg").write_bytes(good)
    pretrain(**{**options, "out": str(tmp_path / "anew"), "seed": 5})  # goes on with the boxes there, of another seed
    counts = [sessions(tmp_path / run)[0]["images"] for run in ("run", "anew")]
    assert counts == [9, 10]


def test_proposals_follow_the_seed_and_are_not_searched_for_where_none_are_used(
    base: dict[str, Any], tmp_path: Path
) -> None:
    def boxes(**options: Any) -> Any:
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        pretrain(**{**base, "proposals": None, "steps": 1, "out": str(out), **options})
        store = ProposalStore.open(out / "proposals")
        assert store.settings.method == "random"
        return store.row(0).boxes

    one, other = (boxes(proposal_method="random", seed=seed) for seed in (0, 5))
    assert not np.array_equal(one, other)
    np.testing.assert_array_equal(boxes(box_source="random"), one)
    np.testing.assert_array_equal(boxes(method="up-detr"), one)
    out = tmp_path / "there"
    propose(images=base["images"], out=str(out / "proposals"), max_boxes=512, workers=1)
    pretrain(**{**base, "proposals": None, "steps": 1, "out": str(out), "method": "up-detr"})  # any boxes will do


@pytest.mark.promise("same-inputs")
def test_other_steps_change_what_is_left_of_the_schedule(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {**base, "out": str(tmp_path / "run"), "steps": 1, "schedule": "cosine"}
    pretrain(**options)
    pretrain(**options, resume=True)
    assert "other steps" not in capsys.readouterr().err
    pretrain(**{**options, "steps": 2, "resume": True})
    assert "the learning rate's schedule (cosine) is that of the new length" in capsys.readouterr().err


def test_the_last_updates_are_in_the_log(base: dict[str, Any], tmp_path: Path) -> None:
    result = pretrain(**{**base, "out": str(tmp_path / "run"), "steps": 3, "log_every": 2})
    assert [record["step"] for record in logged(tmp_path / "run")] == [2, 3]
    assert np.isfinite(result.loss)


def test_a_new_detector_has_its_familys_sizes_and_an_old_one_its_own(base: dict[str, Any], tmp_path: Path) -> None:
    free = {name: None for name in ("encoder_layers", "dropout", "attention_dropout", "activation_dropout")}
    options = {**base, **free, "steps": 1, "detector": "rt-detr", "view_size": 64}
    pretrain(**{**options, "out": str(tmp_path / "run")})
    made = json.loads((tmp_path / "run" / "detector" / "config.json").read_text())
    assert (made["encoder_layers"], made["dropout"], made["attention_dropout"]) == (1, 0.0, 0.0)
    options = {name: value for name, value in options.items() if name not in OF_NEW}
    pretrain(**{**options, "out": str(tmp_path / "more"), "init": str(tmp_path / "run"), "attention_dropout": 0.1})
    again = json.loads((tmp_path / "more" / "detector" / "config.json").read_text())
    assert (again["dropout"], again["attention_dropout"]) == (0.0, 0.1)


@pytest.mark.promise("bad-images")
def test_a_batch_without_readable_images_is_left_out(base: dict[str, Any], tmp_path: Path) -> None:
    """Of several micro-batches the others make the update; of one there is none, and all goes on."""
    photos, own = with_photos(base, tmp_path)
    for n in (0, 3, 4, 8):
        (photos / f"{n:02}.jpg").write_bytes(b"gone")
    options = {**own, "max_bad_share": 0.5, "steps": 12}
    options |= {"save_every": 1, "keep": 0}
    result = pretrain(**{**options, "out": str(tmp_path / "halves"), "batch_size": 2, "accumulate": 2})
    assert result.skipped == 4
    assert np.isfinite(result.loss)

    out = tmp_path / "single"
    pretrain(**{**options, "out": str(out), "batch_size": 1})
    bad = {step for step, record in enumerate(logged(out), 1) if "loss" not in record}
    assert bad
    assert {json.loads(line)["step"] for line in (out / "skipped.jsonl").read_text().splitlines()} <= bad
    for step in range(2, 13):
        one, two = saved(out, step - 1), saved(out, step)
        assert all(torch.equal(one[name], two[name]) for name in one) == (step in bad)


def test_a_micro_batch_left_out_changes_no_gradient(base: dict[str, Any], tmp_path: Path) -> None:
    """The update is that of the other alone, whatever the optimiser makes of the gradients' size."""
    photos, own = with_photos(base, tmp_path)
    options = {**own, "batch_size": 2, "steps": 1, "max_bad_share": 1.0, "clip": 0.0}
    pretrain(**options, out=str(tmp_path / "alone"))
    views = PretrainConfig(**options, out="").views()
    (first,) = ViewBatchSampler(ProposalStore.open(own["proposals"]), views, batch_size=2, total_batches=1, seed=0)
    for n in set(range(10)) - {image for _, image in first}:
        (photos / f"{n:02}.jpg").write_bytes(b"gone")
    pretrain(**{**options, "batch_size": 4, "accumulate": 2}, out=str(tmp_path / "with"))
    assert len((tmp_path / "with" / "skipped.jsonl").read_text().splitlines()) == 2
    (alone,), (found,) = logged(tmp_path / "alone"), logged(tmp_path / "with")
    assert {**found, "epoch": None} == {**alone, "epoch": None}
    assert found["grad_norm"] > 0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("means.json", {"sums": {"loss": 1.5}, "count": 1}),
        ("means.json", {"loss": 1.5}),
        ("scheduler.json", {"last_epoch": 2}),
        ("optimizer.json", {"param_groups": [{"params": ["a"], "lr": 1}]}),
        ("optimizer.json", []),
        ("trainer_state.json", {"steps_done": 2}),
        ("trainer_state.json", None),
    ],
)
@pytest.mark.promise("checkpoints")
def test_a_checkpoint_of_another_release_is_refused(
    checkpoint_of_two: Path, base: dict[str, Any], tmp_path: Path, file: str, content: Any
) -> None:
    """Whole and unharmed, but with other contents than this release writes: one line that says what to do."""
    from siamese_detr.runtime import checkpoint as checkpoints

    shutil.copytree(checkpoint_of_two, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(json.dumps(content))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        path.name: checkpoints.fingerprint(path) for path in folder.iterdir() if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"checkpoint-2.*another release.*sessions\.jsonl|optimizer is of other param"):
        pretrain(**{**base, "out": str(tmp_path / "run"), "resume": True})


def test_a_checkpoint_of_the_first_release_is_continued(
    checkpoint_of_two: Path, base: dict[str, Any], tmp_path: Path
) -> None:
    """It says more of the run's state than is read now."""
    from siamese_detr.runtime import checkpoint as checkpoints

    shutil.copytree(checkpoint_of_two, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "checkpoint-2"
    state = {"epoch": 1.0, "global_step": 2, "max_steps": 2, "logging_steps": 1, "save_steps": 2, "eval_steps": 500}
    (folder / "trainer_state.json").write_text(json.dumps(state | {"train_batch_size": 8, "best_metric": None}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["trainer_state.json"] = checkpoints.fingerprint(folder / "trainer_state.json")
    del manifest["format"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert pretrain(**{**base, "out": str(tmp_path / "run"), "resume": True}).steps == 4


@pytest.fixture(scope="module")
def checkpoint_of_two(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that did two of four steps."""
    out = tmp_path_factory.mktemp("two") / "run"
    pretrain(**{**base, "out": str(out), "steps": 2})
    return out


@pytest.mark.promise("checkpoints")
def test_a_bank_that_lost_files_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "one")})
    (bank,) = (tmp_path / "banks").iterdir()
    (bank / "entries").write_bytes((bank / "entries").read_bytes()[:100])
    with pytest.raises(UserError, match=r"bank .* is damaged \(entries has 100 bytes.*remove that directory"):
        pretrain(**{**options, "out": str(tmp_path / "two")})


def test_detectors_that_read_other_maps_of_a_backbone_have_their_own_banks(
    base: dict[str, Any], tmp_path: Path
) -> None:
    """The same weights, with and without dilation, and at several strides."""
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "one")})
    pretrain(**{**options, "out": str(tmp_path / "dilated"), "detector_options": {"dilation": True}})
    pretrain(**{**options, "out": str(tmp_path / "three"), "detector": "deformable-detr", "hidden_size": 32})
    assert len(list((tmp_path / "banks").iterdir())) == 3


@pytest.mark.promise("bad-images")
def test_images_that_a_bank_could_not_read_are_tried_again(base: dict[str, Any], tmp_path: Path) -> None:
    """By every run that begins or goes on; too many of them end the filling."""
    photos, own = with_photos(base, tmp_path)
    options = {**own, "feature_bank": 2, "bank_dir": str(tmp_path / "banks"), "max_bad_share": 0.1, "steps": 6}
    for n in (2, 3, 4):
        (photos / f"{n:02}.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"of 10 images cannot be read .*failures.jsonl.*max_bad_share 0.1.*--resume"):
        pretrain(**options, out=str(tmp_path / "run"))
    assert not (tmp_path / "run" / "log.jsonl").exists()
    for mended, run, skipped in (((2, 4), "run", 1), ((3,), "other", 0)):
        for n in mended:
            shutil.copy(Path(base["images"]) / f"{n:02}.jpg", photos)
        assert pretrain(**options, out=str(tmp_path / run), resume=True).skipped == skipped
    (bank,) = (tmp_path / "banks").iterdir()
    assert np.fromfile(bank / "state", np.uint8).tolist() == [1] * 20


def test_each_process_computes_its_share_of_a_bank(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes, one has half the entries, as many at a time as it trains on."""
    seen: list[int] = []

    class Second(Team):
        """The second of two processes; the first one never comes, so nobody waits for it."""

        def __init__(self, state: PartialState) -> None:
            super().__init__(state)
            self.rank, self.size = 1, 2

        def wait(self) -> None:
            pass

    def noted(task: SiamesePretext, inputs: Any) -> Any:
        seen.append(len(inputs.pixel_values) // 2)  # of each image two views
        return features(task, inputs)

    features = SiamesePretext.frozen_features
    monkeypatch.setattr(SiamesePretext, "frozen_features", noted)
    monkeypatch.setattr(module, "find_source", lambda *given: find_source(*given[:3], Second(given[3].state)))
    options = {**base, "feature_bank": 1, "bank_dir": str(tmp_path / "banks"), "steps": 1, "max_bad_share": 1.0}
    with contextlib.suppress(UserError):
        pretrain(**options, out=str(tmp_path / "run"))
    assert seen[1:] == [2, 2, 1]  # the first only shows what an entry looks like
    (bank,) = (tmp_path / "banks").iterdir()
    assert np.fromfile(bank / "state", np.uint8).tolist() == [0, 1] * 5


@pytest.mark.parametrize("changed", ["path", "width", "height", "boxes", "scores"])
def test_a_bank_is_of_its_images_and_proposals(changed: str) -> None:
    rows = [StoredImage(f"{n}.jpg", 120, 90, np.full((3, 4), n, np.float32), np.ones(3, np.float32)) for n in (0, 1)]

    def name() -> str:
        store = MagicMock(row=rows.__getitem__, __len__=lambda _: 2)
        return fingerprint(TwoViewDataset(store, ViewConfig(), seed=0), backbone="some")

    before = name()
    assert name() == before
    rows[1] = dataclasses.replace(rows[1], **{changed: getattr(rows[1], changed) * 2})
    assert name() != before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_regions": 7}, "too few queries.*6 queries, 7 regions"),
        ({"detector": "conditional-dter"}, "did you mean 'conditional-detr'"),
        ({"batch_size": 5, "accumulate": 2}, "batch_size 5 must be a multiple"),
        ({"feature_bank": 2, "view_size": None}, "view_size"),
        ({"batch_size": 4, "accumulate": 8}, "batch_size 4 must be a multiple"),
        ({"detector": "rt-detr", "view_size": 72}, "multiple of 32 pixels, not 72; use 64"),
        ({"steps": 0}, "steps must be above 0"),
        ({"epochs": float("nan"), "steps": None}, "epochs must be above 0"),
        ({"lr": float("nan")}, "lr must be 0 or more"),
        ({"lambda_region": -1.0}, "lambda_region must be 0 or more"),
        ({"box_jitter": 0.7}, "box_jitter=0.7"),
        ({"report_to": ["abacus"]}, "no tracker 'abacus'"),
        ({"precision": "fp16"}, "fp16 needs an accelerator"),
        ({"iou": 1.5}, "iou"),
        ({"images": "/nowhere"}, "/nowhere"),
        ({"proposals": "/nowhere"}, "/nowhere"),
        ({"init": "/nowhere"}, "/nowhere"),
        ({"method": "moco"}, "method"),
    ],
)
def test_mistakes_are_named(base: dict[str, Any], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain(**{**base, "proposals": None, "out": str(tmp_path / "run"), **changes})
    assert not (tmp_path / "run" / "proposals").exists()  # mistakes show before hours of proposals


@pytest.mark.parametrize("method", ["up-detr", "detreg"])
def test_the_older_methods(base: dict[str, Any], tmp_path: Path, method: str) -> None:
    options = {**base, "method": method, "num_regions": 3, "out": str(tmp_path / "run"), "steps": 2}
    result = pretrain(**{**options, "view_size": None, "short_sides": (40, 48), "max_size": 64})
    assert np.isfinite(result.loss)


def first_terms(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, float]:
    """The loss terms of a run's first update."""
    calm = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    free = {name: value for name, value in options.items() if name != "crop_size"}
    pretrain(**{**free, **calm, **changes, "out": str(out), "steps": 1})
    record = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return {name: value for name, value in record.items() if name.startswith("loss_")}


BOXES, REGION, GLOBAL = {"loss_class", "loss_box", "loss_giou"}, {"loss_region"}, {"loss_global"}


ALL = BOXES | REGION | GLOBAL


@pytest.mark.parametrize(
    ("changes", "gone", "changed", "kept"),
    [
        ({"discrimination": "none"}, REGION | GLOBAL, set(), BOXES),
        ({"discrimination": "region"}, GLOBAL, set(), BOXES | REGION),
        ({"discrimination": "global"}, REGION, set(), BOXES),
        ({"region_target": "roi"}, set(), REGION, BOXES | GLOBAL),
        ({"target_view": "other"}, set(), REGION, BOXES | GLOBAL),
        ({"cross_view": False}, set(), BOXES | REGION, GLOBAL),
        ({"iou": 0.3}, set(), ALL, set()),
        ({"iou": 0.7}, set(), ALL, set()),
        ({"selection": "diverse"}, set(), BOXES | REGION, set()),
        ({"box_source": "random"}, set(), BOXES | REGION, set()),
        ({"num_queries": 9}, set(), ALL, set()),
        ({"num_regions": 2}, set(), BOXES | REGION, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order of a set is no name
)
def test_ablations_change_what_they_say(
    base: dict[str, Any],
    plain_terms: dict[str, float],
    tmp_path: Path,
    changes: dict[str, Any],
    gone: set[str],
    changed: set[str],
    kept: set[str],
) -> None:
    """The paper's ablations, from the verb's options to the losses: some terms go, some change, some do not.

    Nothing is said of those that may change because other random numbers are drawn. The class loss of a detector that
    is new may be the same.
    """
    terms = first_terms(base, tmp_path / "run", **changes)
    assert ALL - terms.keys() == gone
    differ = {name for name in ALL & terms.keys() if abs(terms[name] / plain_terms[name] - 1) > 1e-5}
    assert changed - {"loss_class"} <= differ
    assert {name: terms[name] for name in kept} == {name: plain_terms[name] for name in kept}


@pytest.fixture(scope="module")
def plain_terms(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return first_terms(base, tmp_path_factory.mktemp("plain") / "run")


@pytest.mark.parametrize("method", ["edge-boxes", "selective-search", "random"])
def test_proposals_come_from_the_method_named(base: dict[str, Any], tmp_path: Path, method: str) -> None:
    pretrain(**{**base, "proposals": None, "proposal_method": method, "out": str(tmp_path / "run"), "steps": 1})
    assert ProposalStore.open(tmp_path / "run" / "proposals").settings.method == method


def test_continuing_from_a_detector(base: dict[str, Any], tmp_path: Path) -> None:
    """``init`` takes the Transformer of any directory, its family and its sizes, and the run records no others."""
    pretrain(**{**base, "out": str(tmp_path / "first"), "steps": 1})
    options = {name: value for name, value in base.items() if name not in OF_NEW}
    options |= {"init": str(tmp_path / "first" / "detector"), "lr": 1e-12, "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "second")})
    assert not {*OF_NEW} & yaml.safe_load((tmp_path / "second" / "config.yaml").read_text()).keys()
    pretrain(**{**options, "out": str(tmp_path / "second"), "resume": True})
    first = load_file(tmp_path / "first" / "detector" / "model.safetensors")
    second = load_file(tmp_path / "second" / "detector" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-9) for name in first)


def test_a_feature_bank_gives_the_losses_of_fresh_views(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to half precision, for as many epochs as it has view sets; shared, resumed, made anew for other views."""
    calm = {"lr": 1e-12, "steps": 7, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    options = {**base, **calm, "discrimination": "region"}
    pretrain(**{**options, "out": str(tmp_path / "fresh")})
    committed = FeatureBank.commit

    def interrupted(bank: FeatureBank, slots: list[int]) -> None:
        committed(bank, slots[: len(slots) // 2])
        raise KeyboardInterrupt

    options |= {"feature_bank": 2, "bank_dir": str(tmp_path / "banks")}
    banked = {**options, "out": str(tmp_path / "banked")}
    with monkeypatch.context() as patch:
        patch.setattr(FeatureBank, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(**banked)
    (bank,) = (tmp_path / "banks").iterdir()
    half_done = np.fromfile(bank / "state", np.uint8)
    assert 0 < half_done.sum() < 20
    before = (bank / "entries").read_bytes()
    pretrain(**{**banked, "resume": True})
    assert np.fromfile(bank / "state", np.uint8).tolist() == [1] * 20
    assert (bank / "entries").read_bytes() == before  # what had been written is what is written again
    fresh, stored = logged(tmp_path / "fresh"), logged(tmp_path / "banked")
    for one, two in zip(fresh[:5], stored[:5], strict=True):  # 20 samples: two epochs
        for name in ("loss", "loss_box", "loss_giou", "loss_class", "loss_region"):
            assert two[name] == pytest.approx(one[name], rel=2e-3), name
    assert fresh[5]["loss_box"] != pytest.approx(stored[5]["loss_box"], rel=1e-3)  # the third epoch sees the first's
    pretrain(**{**options, "out": str(tmp_path / "other"), "feature_bank": 2, "iou": 0.3, "steps": 1})
    assert len(list((tmp_path / "banks").iterdir())) == 2


def test_the_flat_configuration_is_that_of_its_parts() -> None:
    """Every option of views and methods can be given, under its name, and has its default."""
    config = PretrainConfig(images="a", out="b")
    assert config.views() == ViewConfig()
    for method, kind in PRETEXTS.items():
        assert PretrainConfig(images="a", out="b", method=method).pretext() == kind()
    changed = PretrainConfig(images="a", out="b", jitter_queries=False, box_jitter=0.2, view_size=96)
    assert not changed.pretext().jitter_queries  # type: ignore[attr-defined]
    assert (changed.views().box_jitter, changed.views().view_size) == (0.2, 96)


PAPER: dict[str, Any] = {
    **{"backbone": "resnet50", "flip": True, "view_size": None, "crop_size": 128, "box_jitter": 0.1},
    **{"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "color_probability": 0.8},
    **{"gray_probability": 0.2, "blur_probability": 0.5, "blur_sigma": (0.1, 2.0)},
    **{"class_weight": 1, "box_weight": 5, "giou_weight": 2, "no_object_weight": 0.1},
    **{"class_cost": 1, "box_cost": 5, "giou_cost": 2},
    **{"lr": 1e-4, "weight_decay": 1e-4, "clip": 0.1, "warmup": 0},
}
SIAMESE: dict[str, Any] = {
    **{"method": "siamese", "num_regions": 10, "proposal_method": "edge-boxes", "box_source": "proposals"},
    **{"area_range": (0.5, 1.0), "aspect_range": (3 / 4, 4 / 3), "iou": 0.5, "shrink": True, "diagonals": False},
    **{"min_area": 0.05, "selection": "top", "discrimination": "both", "region_target": "crop", "target_view": "own"},
    **{"cross_view": True, "jitter_queries": True, "region_dropout": 0},
}
UP_DETR = {"method": "up-detr", "num_regions": 10, "reconstruction_weight": 1, "patch_dropout": 0.1}
DETREG = {"method": "detreg", "num_regions": 30, "proposal_method": "selective-search", "embedding_weight": 1}
IMAGENET = {"short_sides": tuple(range(320, 481, 16)), "max_size": 600, "batch_size": 256}
COCO = {"short_sides": tuple(range(480, 801, 32)), "max_size": 1333, "batch_size": 64}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], str, int, float, float, int, int]] = {
    # method, images, detector, queries, weights of region and global discrimination, updates, those before the drop
    "imagenet-conditional": (SIAMESE, IMAGENET, "conditional-detr", 100, 5, 10, 300_000, 200_000),
    "imagenet-detr": (SIAMESE, IMAGENET, "detr", 100, 3, 10, 300_000, 200_000),
    "imagenet-deformable-ss": (SIAMESE, IMAGENET, "deformable-detr", 300, 3, 10, 300_000, 200_000),
    "imagenet-deformable-ms": (SIAMESE, IMAGENET, "deformable-detr", 300, 3, 10, 300_000, 200_000),
    "coco-conditional": (SIAMESE, COCO, "conditional-detr", 100, 3, 0.3, 120_000, 80_000),
    "imagenet-up-detr": (UP_DETR, IMAGENET, "detr", 100, 0, 0, 60 * 5000, 40 * 5000),
    "imagenet-detreg": (DETREG, IMAGENET, "detr", 100, 0, 0, 60 * 5000, 40 * 5000),
}
"""What the papers say of each; of epochs, of 5000 updates."""


def recipe(name: str) -> PretrainConfig:
    return validate(PretrainConfig, read_sources(PretrainConfig, name, None) | {"images": "a", "out": "b"}, name)


def test_every_recipe_is_valid() -> None:
    """The shipped YAML files name existing settings with valid values."""
    names = recipe_names(PretrainConfig)
    assert set(names) == {*RECIPES, "laptop", "demo"}
    for config in map(recipe, names):
        assert config.batch_size % config.accumulate == 0


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_those_of_the_papers(name: str) -> None:
    config = recipe(name)
    method, images, detector, queries, of_regions, of_images, steps, drop = RECIPES[name]
    expected = PAPER | method | images | {"detector": detector, "num_queries": queries}
    if method is SIAMESE:
        expected |= {"lambda_region": of_regions, "lambda_global": of_images}
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.total_steps(5000 * 256) == steps
    factor = lr_factor(config.schedule, steps, config.drop_at, config.warmup)
    assert [factor(step) for step in (0, drop - 1, drop, steps - 1)] == pytest.approx([1, 1, 0.1, 0.1])
    plan = plan_detector(detector, config.backbone, **config.sizes())
    sizes = dict(hidden_size=256, heads=8, encoder_layers=6, decoder_layers=6, num_queries=queries)
    sizes |= dict(ffn_size=1024 if detector == "deformable-detr" else 2048)
    assert {key: getattr(plan.size, key) for key in sizes} == sizes
    assert plan.size.dropout == plan.size.attention_dropout == plan.size.activation_dropout == 0.1
    if detector == "deformable-detr":
        assert plan.config.num_feature_levels == (4 if name.endswith("ms") else 1)
        assert plan.config.encoder_n_points == plan.config.decoder_n_points == 4


def test_every_micro_batch_of_every_process_draws_its_own_dropout(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, forward, drawn, rank = Loop.gradients, SiamesePretext.forward, [], 0

    def gradients_of_rank(loop: Loop, *arguments: Any) -> Any:
        loop.team.rank = rank
        return gradients(loop, *arguments)

    def noted(*arguments: Any) -> Any:
        drawn.append(torch.rand(()).item())
        return forward(*arguments)

    monkeypatch.setattr(Loop, "gradients", gradients_of_rank)
    monkeypatch.setattr(SiamesePretext, "forward", noted)
    for rank in range(2):
        pretrain(**{**base, "out": str(tmp_path / str(rank)), "steps": 2, "accumulate": 2})
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2


def test_gradient_checkpointing_changes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    pretrain(**{**base, "out": str(tmp_path / "plain"), "steps": 2})
    pretrain(**{**base, "out": str(tmp_path / "saving"), "steps": 2, "checkpoint_activations": True})
    assert logged(tmp_path / "plain") == logged(tmp_path / "saving")


@slow
def test_compiling_changes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    """But the dropout, which is PyTorch's then."""
    options = {**base, "steps": 2, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    pretrain(**{**options, "out": str(tmp_path / "plain")})
    pretrain(**{**options, "out": str(tmp_path / "compiled"), "compile": True})
    for plain, compiled in zip(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), strict=True):
        for name in (name for name in plain if name.startswith("loss")):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4), name
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)  # batch norms over four images


def test_without_a_compiler_compiling_ends_in_one_line(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "missing")))
    with pytest.raises(UserError, match=r"torch.compile failed \(.*compiler.*leave out compile"):
        pretrain(**{**base, "out": str(tmp_path / "run"), "compile": True})


def test_what_a_compiler_says_is_told() -> None:
    def refusing(*_: Any) -> Any:
        raise ValueError("nothing to compile with")

    compiled = torch.compile(lambda x: x * 2, backend=refusing)
    said = r"raised: ValueError: nothing to compile with\).* and go on"
    with pytest.raises(UserError, match=said), machine_explained("go on"):
        compiled(torch.ones(3))
