"""Fine-tuning: it learns, continues exactly, keeps what was pre-trained, and says what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from label_files import write_yolo
from siamese_detr import cli
from siamese_detr.config import read_sources, recipe_names, validate
from siamese_detr.detectors.build import build_detector
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.images import read_labels
from siamese_detr.runtime.signals import Preempted
from siamese_detr.training.detection_task import is_due
from siamese_detr.training.finetune import finetune
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.labelled_dataset import EpochBatches
from siamese_detr.training.optimizer import lr_factor
from siamese_detr.training.task import Callback
from tiny_finetuning import CLASSES, QUICK, TINY, learned, write_scenes

HEAD = ("class_labels_classifier", "class_embed")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines(run / "log.jsonl") if "loss" in line]


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> str:
    return str(write_scenes(tmp_path_factory.mktemp("data") / "scenes", 6))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """What a pre-training run leaves: a detector with one nameless class, inside a run directory."""
    run = tmp_path_factory.mktemp("pretrained")
    build_detector("conditional-detr", "random:efficientnet-lite0", seed=3, **TINY).save(run / "detector")
    return run


def test_it_learns():
    result, _ = learned()
    history = [loss for _, loss, _ in losses(result.out)]
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    assert result.metrics["AP50"] > 0.1
    assert result.metrics["AP"] == max(record["AP"] for record in result.history)
    assert [record["step"] for record in result.history] == [30, 60]
    metrics = json.loads((result.out / "metrics.json").read_text())
    assert metrics["best"]["AP"] == result.metrics["AP"]
    assert [row["name"] for row in metrics["last"]["classes"]] == list(CLASSES)
    assert lines(result.out / "history.jsonl") == result.history


def test_the_detector_knows_its_classes_and_size():
    result, _ = learned()
    for name in ("best", "last"):
        model = AutoModelForObjectDetection.from_pretrained(result.out / name)
        assert model.config.id2label == dict(enumerate(CLASSES))
        processor = json.loads((result.out / name / "preprocessor_config.json").read_text())
        assert {k: v for k, v in processor["size"].items() if v} == {"height": 96, "width": 96}


def test_a_frozen_backbone_stays_as_it_was():
    result, _ = learned()
    trained = load_file(result.out / "last" / "model.safetensors")
    fresh = build_detector("conditional-detr", "efficientnet-lite0", num_labels=2, seed=0, **TINY).model.state_dict()
    backbone = [name for name in trained if ".backbone." in name or "backbone" in name.split(".")]
    assert len(backbone) > 100
    differing = [name for name in fresh if name in trained and not torch.equal(fresh[name], trained[name])]
    assert differing
    assert not set(differing) & set(backbone)


def test_the_averages_of_the_weights_are_what_is_saved(labels, tmp_path):
    """In three runs of one, two and three updates, the weights are known; those saved with ``ema`` are their means."""
    options = {**TINY, **QUICK, "train": labels}
    weights = []
    for steps in (1, 2, 3):
        finetune(out=str(tmp_path / str(steps)), steps=steps, **options)
        weights.append(load_file(tmp_path / str(steps) / "last" / "model.safetensors"))
    finetune(out=str(tmp_path / "averaged"), steps=3, ema=0.15, **options)
    averaged = load_file(tmp_path / "averaged" / "last" / "model.safetensors")
    start = build_detector("conditional-detr", "efficientnet-lite0", num_labels=2, seed=0, **TINY).model.state_dict()
    name = next(n for n in weights[0] if "decoder.layers.0" in n and n in start and not start[n].equal(weights[0][n]))
    expected = start[name]
    for step, after in enumerate(weights, 1):
        decay = min(0.15, step / (step + 9))
        expected = decay * expected + (1 - decay) * after[name]
    assert not torch.equal(averaged[name], weights[-1][name])
    torch.testing.assert_close(averaged[name], expected)


def test_patience_ends_a_run_that_no_longer_improves(labels, tmp_path, capsys):
    options = {**TINY, **QUICK, "lr": 1e-9, "train": labels, "val": labels, "out": str(tmp_path), "patience": 2}
    result = finetune(steps=12, eval_every=0.67, **options)
    assert [record["step"] for record in result.history] == [1, 2, 3]
    assert "stopped after 3 of 12 steps" in capsys.readouterr().err
    assert finetune(steps=12, eval_every=0.67, resume=True, **options).history == result.history
    assert json.loads((tmp_path / "last" / "siamese_detr.json").read_text())["finetuned"]["steps"] == 3


def test_parts_can_be_frozen_and_sizes_of_squares_be_drawn(labels, tmp_path):
    options = {**TINY, **QUICK, "backbone_lr": 1e-3, "train": labels, "min_size": 64, "image_size": 96, "steps": 2}
    del options["crop"]  # the strong augmentation does not read it
    finetune(out=str(tmp_path / "run"), freeze=["blocks.0", "decoder"], augment="strong", **options)
    trained = load_file(tmp_path / "run" / "last" / "model.safetensors")
    build_detector("conditional-detr", "efficientnet-lite0", num_labels=2, seed=0, **TINY).save(tmp_path / "fresh")
    fresh = load_file(tmp_path / "fresh" / "model.safetensors")
    changed = {name for name in fresh if not torch.equal(fresh[name], trained[name])}
    assert any("blocks.1." in name for name in changed)
    assert any(".encoder." in name for name in changed)
    assert not any("blocks.0." in name or ".decoder." in name for name in changed)
    with pytest.raises(UserError, match=r"no part 'neck'; its parts are .*decoder, encoder"):
        finetune(out=str(tmp_path / "other"), freeze=["neck"], **options)


def test_only_the_class_head_is_initialised_again(pretrained, labels, tmp_path):
    out = tmp_path / "run"
    # At a learning rate of zero every tensor stays where it started.
    finetune(train=labels, out=str(out), model=str(pretrained), steps=1, **{**QUICK, "lr": 0.0})
    before = load_file(pretrained / "detector" / "model.safetensors")
    after = load_file(out / "last" / "model.safetensors")
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing
    assert all(any(part in name for part in HEAD) for name in differing)
    start = json.loads((out / "start.json").read_text())
    assert sorted(start["class_head"]) == sorted(differing)
    assert start["kept"] + len(differing) >= len(before)
    assert start["missing"] == start["ignored"] == []


def test_a_share_of_what_was_pretrained_is_kept_but_all_of_a_detector_with_classes(labels, tmp_path):
    build = build_detector("conditional-detr", "random:efficientnet-lite0", seed=3, **TINY)
    build.save(tmp_path / "pretrained", provenance={"method": "siamese"})
    options = {**QUICK, "train": labels, "lr": 0.0, "steps": 1}
    name = "model.decoder.layers.0.fc1.weight"
    weights = {}
    for share in (0.0, 0.5, 1.0):
        out = tmp_path / f"share {share}"
        finetune(out=str(out), model=str(tmp_path / "pretrained"), kept_share=share, **options)
        weights[share] = load_file(out / "last" / "model.safetensors")
    assert torch.equal(weights[1.0][name], load_file(tmp_path / "pretrained" / "model.safetensors")[name])
    assert not torch.equal(weights[0.0][name], weights[1.0][name])
    torch.testing.assert_close(weights[0.5][name], (weights[0.0][name] + weights[1.0][name]) / 2)
    again = tmp_path / "again"
    finetune(out=str(again), model=str(tmp_path / "share 1.0" / "last"), kept_share=0.5, **options)
    assert torch.equal(load_file(again / "last" / "model.safetensors")[name], weights[1.0][name])
    with pytest.raises(UserError, match="kept_share has no effect: the detector starts from scratch"):
        finetune(out=str(tmp_path / "scratch"), kept_share=0.5, **options)


def test_the_validation_split_of_a_data_yaml_is_found(labels, tmp_path, capsys):
    path = write_yolo(tmp_path / "yolo", read_labels(labels))
    for count, sources in enumerate((str(path), [labels, str(path)])):
        result = finetune(train=sources, out=str(tmp_path / f"run{count}"), steps=1, **TINY, **QUICK)
        assert len(result.history) == 1
        assert f"validation images in {tmp_path / 'yolo/images/val'}" in capsys.readouterr().err
    for train, val in ((labels, None), (str(path), "none")):
        result = finetune(train=train, val=val, out=str(tmp_path / f"without-{val}"), steps=1, **TINY, **QUICK)
        assert not result.history
        assert "no validation labels (--val)" in capsys.readouterr().err
        with pytest.raises(UserError, match="patience has no effect: there are no validation labels"):
            finetune(train=train, val=val, out=str(tmp_path / "refused"), patience=1, **TINY, **QUICK)


def test_classes_that_only_validation_knows_are_named(labels, tmp_path, capsys):
    content = json.loads(Path(labels).read_text())
    content["categories"][1]["name"] = "rings"
    other = Path(labels).with_name("other.json")
    other.write_text(json.dumps(content))
    finetune(
        train=labels,
        val=str(other),
        val_images=labels.removesuffix(".json"),
        out=str(tmp_path / "run"),
        steps=1,
        **TINY,
        **QUICK,
    )
    assert "classes without training labels are not evaluated: rings" in capsys.readouterr().err


@pytest.mark.promise("same-inputs")
def test_a_run_goes_on_when_the_detector_it_started_from_has_moved(pretrained, labels, tmp_path):
    first, moved = tmp_path / "first", tmp_path / "moved"
    shutil.copytree(pretrained / "detector", first)
    options = {**QUICK, "train": labels, "out": str(tmp_path / "run"), "save_every": 1, "schedule": "constant"}
    finetune(**options, model=str(first), steps=1)
    first.rename(moved)
    finetune(**options, model=str(moved), steps=2, resume=True)
    finetune(**{**options, "out": str(tmp_path / "whole")}, model=str(moved), steps=2)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    with pytest.raises(UserError, match="has done 2 steps already, more than the 1 asked for"):
        finetune(**options, model=str(moved), steps=1, resume=True)
    build_detector("conditional-detr", "random:efficientnet-lite0", seed=4, **TINY).save(first)
    with pytest.raises(UserError, match="began with other starting detector"):
        finetune(**options, model=str(first), steps=3, resume=True)


@pytest.mark.promise("exact-resume")
class Follows(Callback):
    def __init__(self, fails: tuple[str, int] | None = None) -> None:
        self.fails, self.seen = fails, []

    def note(self, event: str, step: int, values: dict) -> None:
        self.seen.append((event, step, dict(values)))
        if self.fails == (event, step):
            raise ValueError("enough")

    def on_log(self, step, values):
        self.note("log", step, values)

    def on_evaluation(self, step, metrics):
        self.note("evaluation", step, metrics)


def test_callbacks_follow_a_run(labels, tmp_path):
    options = {**TINY, **QUICK, "train": labels, "val": labels, "steps": 4, "eval_every": 3, "save_every": 100}
    follows = Follows()
    result = finetune(out=str(tmp_path / "run"), **options, callbacks=[follows])
    logged = [values for event, _, values in follows.seen if event == "log"]
    assert [values["loss"] for values in logged] == [loss for _, loss, _ in losses(result.out)]
    assert [(step, values["AP"]) for event, step, values in follows.seen if event == "evaluation"] == [
        (record["step"], record["AP"]) for record in result.history
    ]
    for fails in (("log", 2), ("evaluation", 4)):
        out = tmp_path / fails[0]
        with pytest.raises(UserError, match=rf"Follows.on_{fails[0]} failed: .*enough.*saved at step {fails[1]}"):
            finetune(out=str(out), **options, callbacks=[Follows(fails)])
        again = finetune(out=str(out), **options, resume=True)
        assert losses(again.out) == losses(result.out)
        assert again.history == result.history
    with pytest.raises(UserError, match="is no Callback"):
        finetune(out=str(tmp_path / "none"), **options, callbacks=[print])
    assert "callbacks:" in finetune.__doc__


def test_rare_classes_lengthen_an_epoch_and_a_run_continues_exactly(labels, tmp_path, capsys):
    options = {**TINY, **QUICK, "train": labels, "repeat_factor": 1.0, "batch_size": 4, "crop": 0.5}
    whole = finetune(out=str(tmp_path / "whole"), **options, epochs=2, save_every=2, keep=0)
    factor = 2**0.5  # each class is in half of the images
    steps = round(2 * round(6 * factor) / 4)
    assert f"{steps} steps of 4 images (2 epochs)" in capsys.readouterr().err
    shutil.copytree(whole.out, tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / f"checkpoint-{steps}")
    again = finetune(out=str(tmp_path / "killed"), **options, epochs=2, save_every=2, resume=True)
    assert losses(again.out) == losses(whole.out)


def test_a_killed_run_ends_as_if_it_had_not_been(labels, tmp_path):
    options = {**TINY, **QUICK, "dropout": 0.1, "crop": 0.5, "square": False, "image_size": 64, "backbone_lr": 1e-4}
    options |= {"train": labels, "val": labels, "steps": 7, "save_every": 2, "eval_every": 2, "ema": 0.9}
    whole = finetune(out=str(tmp_path / "whole"), **options)
    config = tmp_path / "run.json"
    config.write_text(json.dumps({**options, "out": str(tmp_path / "killed"), "workers": 2}))
    script = (
        "import json, os, signal, sys\n"
        "from siamese_detr.training.detection_task import DetectionTask\n"
        "from siamese_detr.training.finetune import finetune\n"
        "step, calls = DetectionTask.step, []  # two calls try what a step takes\n"
        "def killed(*args):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(*args)\n"
        "DetectionTask.step = killed\n"
        "finetune(**json.load(open(sys.argv[1])))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    threads = torch.get_num_threads()
    process = subprocess.run([sys.executable, "-c", script, str(config)], env=environment, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-4").is_dir()
    again = finetune(**{**options, "out": str(tmp_path / "killed"), "resume": True})
    if threads == 1:  # sums over several threads are added in another order than over one
        assert losses(again.out) == losses(whole.out)
        assert again.history == whole.history
        for name in ("best", "last"):
            one = load_file(whole.out / name / "model.safetensors")
            other = load_file(again.out / name / "model.safetensors")
            assert all(torch.equal(one[key], other[key]) for key in one)
    finished = finetune(**{**options, "out": str(tmp_path / "killed"), "resume": True})
    assert finished.history == again.history
    assert losses(finished.out) == losses(again.out)


def test_sigterm_saves_and_ends_with_the_documented_code(labels, tmp_path):
    out = tmp_path / "run"
    options = [f"--{k}={v}" for k, v in {"train": labels, "out": out, "steps": 500, "save_every": 500}.items()]
    quick = {k: v for k, v in QUICK.items() if not isinstance(v, bool)} | {"image_size": 64}
    options += [f"--{k}={v}" for k, v in {**TINY, **quick}.items()] + ["--no-progress"]
    process = subprocess.Popen([sys.executable, "-m", "siamese_detr.cli", "finetune", *options], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out / "log.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors.decode()[-2000:]
    assert list((out / "checkpoints").glob("checkpoint-*"))


@pytest.mark.promise("preemption")
def test_a_stop_in_an_evaluation_waits_for_one_batch_and_the_evaluation_is_done_again(labels, tmp_path, monkeypatch):
    """Asked to stop at the second image; continued, again at the first; then all is as if nothing had been."""
    options = {**TINY, **QUICK, "dropout": 0.1, "crop": 0.5, "train": labels, "val": labels, "steps": 7}
    options |= {"save_every": 100, "eval_every": 2, "eval_batch_size": 1, "ema": 0.9}
    whole = finetune(out=str(tmp_path / "whole"), **options)
    assert [record["step"] for record in whole.history] == [4, 7]
    options |= {"out": str(tmp_path / "run"), "resume": True}
    for count in (2, 1):
        detect, calls = Detector.detect, []

        def asked_to_stop(*args, count=count, detect=detect, calls=calls):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGTERM)
            return detect(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Detector, "detect", asked_to_stop)
            with pytest.raises(Preempted, match=r"SIGTERM: saved at step 4 of 7.*--resume"):
                finetune(**options)
        assert len(calls) == count
        assert not lines(tmp_path / "run" / "history.jsonl")
    again = finetune(**options)
    assert again.history == whole.history
    assert losses(again.out) == losses(whole.out)
    for name in ("best", "last"):
        one, other = (load_file(run.out / name / "model.safetensors") for run in (whole, again))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_labels_of_a_fraction_are_kept(labels, tmp_path):
    out = tmp_path / "run"
    finetune(train=labels, out=str(out), fraction=0.34, steps=1, **TINY, **QUICK)
    part = json.loads((out / "train.json").read_text())
    assert len(part["images"]) == 2
    assert {a["category_id"] for a in part["annotations"]} == {5, 6}
    assert not (out / "best").exists()
    assert not (out / "metrics.json").exists()


@pytest.mark.promise("same-inputs")
def test_a_run_is_not_continued_on_other_labels(tmp_path):
    """One box moved, in as many images; the same labels elsewhere are the same."""
    labels = write_scenes(tmp_path / "scenes", 4)
    options = {**TINY, **QUICK, "out": str(tmp_path / "run"), "image_size": 64}
    finetune(**options, train=str(labels), steps=1)
    content = json.loads(labels.read_text())
    shutil.copytree(labels.with_suffix(""), tmp_path / "moved" / "scenes")
    (tmp_path / "moved" / "scenes.json").write_text(json.dumps(content))
    content["annotations"][0]["bbox"][0] -= 1
    labels.write_text(json.dumps(content))
    with pytest.raises(UserError, match="began with other training labels"):
        finetune(**options, train=str(labels), steps=2, resume=True)
    with pytest.raises(UserError, match="began with other validation labels"):
        finetune(**options, train=str(tmp_path / "moved" / "scenes.json"), val=str(labels), steps=2, resume=True)
    finetune(**options, train=str(tmp_path / "moved" / "scenes.json"), steps=2, resume=True)


@pytest.mark.promise("bad-images")
def test_unreadable_validation_images_are_reported_and_listed(tmp_path, capsys):
    labels, validation = write_scenes(tmp_path / "a", 4), write_scenes(tmp_path / "b", 4, seed=1)
    (tmp_path / "b" / "2.jpg").write_bytes(b"gone")
    options = {**TINY, **QUICK, "image_size": 64, "eval_every": 1, "steps": 2}
    finetune(**options, train=str(labels), val=str(validation), out=str(tmp_path / "run"))
    (record,) = map(json.loads, (tmp_path / "run" / "skipped-validation.jsonl").read_text().splitlines())
    assert record["path"].endswith("2.jpg")
    assert record["reason"]
    assert capsys.readouterr().err.count("1 of 4 validation images cannot be read") == 1


@pytest.mark.promise("non-finite")
def test_a_replay_leaves_the_history(tmp_path):
    """A run that went on after the step that is replayed keeps what it measured since."""
    labels = str(write_scenes(tmp_path / "scenes", 4))
    options = {**TINY, **QUICK, "image_size": 64, "eval_every": 1, "save_every": 1, "keep": 0, "steps": 3}
    options |= {"train": labels, "val": labels, "out": str(tmp_path / "run")}
    history = finetune(**options).history
    assert len(history) == 3
    document = tmp_path / "run" / "nonfinite.json"  # as if the second step had been stopped
    document.write_text(json.dumps({"step": 1, "processes": 1, "checkpoint": "checkpoints/checkpoint-1"}))
    assert "step 2 " in (finetune(**options, replay=str(document)).replay or "").replace("step 2:", "step 2 ")
    assert [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()] == history


@pytest.mark.promise("bad-images")
def test_unreadable_images_are_skipped_and_listed(tmp_path):
    labels = write_scenes(tmp_path / "scenes", 6)
    (tmp_path / "scenes" / "2.jpg").write_bytes((tmp_path / "scenes" / "2.jpg").read_bytes()[:300])
    result = finetune(
        train=str(labels), val=str(labels), out=str(tmp_path / "run"), steps=3, max_bad_share=0.5, **TINY, **QUICK
    )
    assert result.skipped == 1
    (line,) = lines(result.out / "skipped.jsonl")  # once, though three epochs met it
    assert line["path"].endswith("2.jpg")
    with pytest.raises(UserError, match="max_bad_share"):
        finetune(train=str(labels), out=str(tmp_path / "strict"), steps=9, max_bad_share=0.01, **TINY, **QUICK)


def test_a_run_shows_what_it_learns_from_and_what_it_has_learnt(tmp_path, capsys):
    labels = str(write_scenes(tmp_path / "scenes", 4))
    options = {**TINY, **QUICK, "progress": True, "pages": True, "steps": 2, "eval_every": 1}
    words = ["finetune", labels, str(tmp_path / "run"), f"--val={labels}"]
    words += [f"--{name}={value}" for name, value in options.items()]
    assert cli.main(words) == 0
    output, errors = capsys.readouterr()
    with Image.open(tmp_path / "run" / "augmented.jpg") as page:
        assert page.size == (1600, 400)
        assert np.asarray(page).std() > 20
    assert re.search(r"step 1 of 2: AP [\d.]+  AP50 [\d.]+  \(best so far\), .* left", errors)
    assert re.search(r"step 2 of 2: AP [\d.]+  AP50 [\d.]+  \(best [\d. a-z]+\), 0 s left", errors)
    assert all(re.search(rf"^ *{name} +2 ", output, re.MULTILINE) for name in CLASSES)
    assert f"{tmp_path / 'run' / 'report.html'}" in errors
    assert "Best and worst" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").mkdir()  # a report that cannot be written costs no detector
    assert cli.main([*words, "--resume"]) == 0
    assert "siamese-detr: no report: cannot write" in capsys.readouterr().err


@pytest.mark.filterwarnings("error:Detected call of")
def test_a_run_may_begin_with_images_that_cannot_be_read(tmp_path):
    labels = write_scenes(tmp_path / "scenes", 4)
    options = {**TINY, **QUICK, "batch_size": 2, "max_bad_share": 1, "steps": 2}
    for _, number in EpochBatches(4, 2, 1, 0)[0]:
        (tmp_path / "scenes" / f"{number}.jpg").write_bytes(b"gone")
    result = finetune(train=str(labels), out=str(tmp_path / "run"), **options)
    assert result.skipped == 2
    assert ["loss" in line for line in lines(result.out / "log.jsonl")] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"model": "a", "init": "b"}, "one of them"),
        ({"train": "missing.json"}, "missing.json"),
        ({"detector": "conditional-dert"}, "conditional-detr"),
        ({"lr": -1.0}, "lr must be 0 or more"),
        ({"epochs": float("nan"), "steps": None}, "epochs must be above 0"),
        ({"eval_every": float("nan")}, "eval_every must be 0 or more"),
        ({"steps": 0}, "steps must be above 0"),
        ({"log_every": 0}, "log_every must be above 0"),
        ({"report_to": ["abacus"]}, "no tracker 'abacus'"),
        ({"keep": -1}, "keep must be 0 or more"),
        ({"dropout": 2.0}, "dropout must be between 0 and 1"),
        ({"num_queries": 0}, "num_queries must be above 0"),
        ({"seed": 10**400}, "seed must be below"),
        ({"lr": float("inf")}, "lr must be 0 or more"),
        ({"fraction": 0.0}, "fraction"),
        ({"image_size": 8}, "image_size"),
        ({"min_size": 200}, "min_size"),
        ({"layer_decay": 0.7, "backbone_lr": 1e-4}, "no attention blocks"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"image_size": None, "min_size": 2000}, "min_size 2000 is above the image size"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"batch_size": 3, "accumulate": 2}, "multiple"),
    ],
)
def test_mistakes_are_named(labels, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        finetune(**{"train": labels, "out": str(tmp_path / "run"), "steps": 1, **TINY, **QUICK, **options})


def test_a_directory_belongs_to_one_run(labels, tmp_path):
    options = {"train": labels, "out": str(tmp_path / "run"), "steps": 1, **TINY, **QUICK}
    finetune(**options)
    with pytest.raises(UserError, match="--resume"):
        finetune(**options)
    with pytest.raises(UserError, match=r"lr: 0\.001 -> 0\.1"):
        finetune(**{**options, "lr": 0.1, "resume": True})


def test_validation_without_a_known_class_is_refused_before_training(labels, tmp_path):
    other = json.loads(Path(labels).read_text())
    for category in other["categories"]:
        category["name"] += " of another kind"
    path = Path(labels).with_name("other.json")
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="no name in common"):
        finetune(
            train=labels,
            val=str(path),
            val_images=str(Path(labels).with_suffix("")),
            out=str(tmp_path / "run"),
            **QUICK,
        )


@pytest.mark.parametrize(("images", "epochs", "eval_every"), [(402, 20, 10), (40, 40, 1), (33, 50, 1), (3, 9, 0.5)])
def test_evaluations_are_even_and_end_with_the_run(images: int, epochs: float, eval_every: float) -> None:
    config = FinetuneConfig(train="t.json", out="o", val="v.json", epochs=epochs, eval_every=eval_every)
    steps, count = config.total_steps(images), config.evaluations(images)
    at = [step for step in range(1, steps + 1) if is_due(step, steps, count)]
    assert len(at) == min(round(epochs / eval_every), steps)
    assert at[-1] == steps
    gaps = {after - before for before, after in zip([0, *at], at, strict=False)}
    assert max(gaps) - min(gaps) <= 1
    config.eval_every = 0
    count = config.evaluations(images)
    assert [step for step in range(1, steps + 1) if is_due(step, steps, count)] == [steps]
    assert not is_due(steps, steps, 0)


@pytest.mark.parametrize(
    ("images", "options", "steps", "short"),
    [
        *((84, {"epochs": "auto"}, 1650, False), (400, {"epochs": "auto"}, 3600, False), (40000, {}, 60000, False)),
        *((84, {"epochs": 50}, 525, True), (84, {"epochs": 60}, 630, False), (84, {"steps": 100}, 100, True)),
    ],
)
def test_the_budget_suits_the_number_of_images(images: int, options: dict, steps: int, short: bool) -> None:
    config = FinetuneConfig("train.json", "run", batch_size=8, **options)
    assert config.total_steps(images) == steps
    assert config.budget(images).startswith(f"{steps} steps of 8 images")
    assert ("that is short" in config.budget(images)) == short


def test_every_update_is_in_the_log_and_in_an_evaluations_loss(labels, tmp_path):
    out = tmp_path / "run"
    finetune(train=labels, val=labels, out=str(out), steps=5, eval_every=1, **TINY, **{**QUICK, "log_every": 4})
    evaluated = [line["step"] for line in lines(out / "history.jsonl")]
    assert evaluated[-1] == 5
    assert [line["step"] for line in lines(out / "log.jsonl") if "loss" in line] == sorted({4, *evaluated})
    assert all(line["train_loss"] > 0 for line in lines(out / "history.jsonl"))


def recipe(name: str) -> FinetuneConfig:
    return validate(FinetuneConfig, read_sources(FinetuneConfig, name, None) | {"train": "a", "out": "b"}, name)


def test_every_recipe_is_valid() -> None:
    names = recipe_names(FinetuneConfig)
    assert set(names) == {"paper", "paper-10-percent", "laptop", "gpu"}
    for name in names:
        recipe(name)


@pytest.mark.parametrize(("name", "fraction", "epochs"), [("paper", 1.0, 50), ("paper-10-percent", 0.1, 400)])
def test_recipes_are_those_of_the_papers(name: str, fraction: float, epochs: int) -> None:
    config = recipe(name)
    expected = {
        **{"fraction": fraction, "epochs": epochs, "steps": None, "detector": "conditional-detr"},
        **{"lr": 1e-4, "backbone_lr": 5e-5, "weight_decay": 1e-4, "clip": 0.1, "warmup": 0},
        **{"batch_size": 16, "image_size": 800, "max_size": 1333, "min_size": 480, "colour_jitter": 0},
    }
    assert {key: getattr(config, key) for key in expected} == expected
    assert not config.square
    steps = config.total_steps(1600)
    assert steps == 100 * epochs
    factor = lr_factor(config.schedule, steps, config.drop_at, config.warmup)
    drop = steps * 4 // 5  # of 50 epochs at 40
    assert [factor(step) for step in (0, drop - 1, drop, steps - 1)] == pytest.approx([1, 1, 0.1, 0.1])
