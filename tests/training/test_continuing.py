"""``pretrain`` on images that are damaged or moved, and continued: what may change meanwhile and what may not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import textured
from runs import logged, saved, with_photos
from siamese_detr.errors import UserError
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.store import ProposalStore
from siamese_detr.runtime.rundir import sessions
from siamese_detr.training.pretrain import pretrain
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.views.sampler import ViewBatchSampler

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")


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
def test_what_the_list_of_images_leaves_out_is_reported(
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


@pytest.mark.promise("same-inputs")
def test_a_run_is_not_continued_on_as_many_other_images_or_other_boxes(base: dict[str, Any], tmp_path: Path) -> None:
    """Proposals of another seed; a picture more; one less and one more. Moved with its pictures, the run goes on."""
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
    textured(10).save(photos / "10.jpg")
    with pytest.raises(UserError, match="began with images 10, and now there are 11"):
        pretrain(**{**options, "proposals": store("more"), "resume": True})
    (photos / "10.jpg").unlink()
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
    with pytest.raises(UserError, match="has done 4 steps already"):
        pretrain(**{**options, **moved, "steps": 3})


@pytest.mark.promise("checkpoints")
def test_a_run_whose_checkpoints_vanished_is_not_started_over(base: dict[str, Any], tmp_path: Path) -> None:
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
    """Proposals computed again, of the later half of the pictures first: the run goes on to the same bits."""
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


@pytest.mark.promise("bad-images")
def test_unreadable_images_are_listed_and_limited(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped, reported, counted and listed once, with reasons; too many of them, or no others, end the run."""
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
def test_repaired_images_are_taken_when_a_run_goes_on(base: dict[str, Any], tmp_path: Path) -> None:
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
    propose(images=str(photos), out=str(tmp_path / "again" / "proposals"), method="random", workers=1)
    (photos / "04.jpg").write_bytes(good)
    pretrain(**{**options, "out": str(tmp_path / "again"), "seed": 5})  # goes on with the boxes there, of another seed
    counts = [sessions(tmp_path / run)[0]["images"] for run in ("run", "again")]
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
