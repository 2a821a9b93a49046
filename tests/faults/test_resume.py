"""A run survives: real processes, killed for real, continue bit for bit."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import textured
from runs import TINY, Run, logged, team
from siamese_detr.runtime.checkpoint import latest_valid, list_checkpoints


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of a tiny run on 14 images with their proposals, one image truncated after these were computed."""
    from siamese_detr.proposals.propose import propose

    root = tmp_path_factory.mktemp("resume")
    photos = root / "photos"
    photos.mkdir()
    for n in range(14):
        textured(n, *((120, 90) if n % 3 else (90, 120))).save(photos / f"{n:02}.jpg")
    propose(images=str(photos), out=str(root / "store"), method="random", workers=1)
    broken = photos / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:700])
    return TINY | {"images": str(photos), "proposals": str(root / "store"), "max_bad_share": 0.5}


@pytest.fixture(scope="module")
def uninterrupted(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory that all interrupted ones must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run = Run(base | {"out": str(out)})
    assert run.wait() == 0, run.text
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All that a finished run saved, of model and optimizer."""
    newest = list_checkpoints(out / "checkpoints")[-1]
    return load_file(newest / "model.safetensors") | load_file(newest / "optimizer.safetensors")


def assert_same(out: Path, whole: Path) -> None:
    ours, theirs = weights(out), weights(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert logged(out) == logged(whole)
    assert (out / "skipped.jsonl").read_text() == (whole / "skipped.jsonl").read_text()
    assert load_file(out / "detector" / "model.safetensors").keys()


@pytest.mark.promise("exact-resume")
def test_killed_at_random_moments(base: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    """kill -9 wherever it falls, other numbers of workers each time: the same weights, losses and skipped images."""
    moments = random.Random(time.time_ns())
    options = base | {"out": str(tmp_path / "run"), "resume": True, "save_every": 1}
    for attempt in range(4):
        run = Run(options | {"workers": attempt % 3})
        run.until_step(2 * attempt + 1)
        time.sleep(moments.uniform(0, 0.15))
        with contextlib.suppress(ProcessLookupError):  # the last one may have come to its end
            run.signal(signal.SIGKILL)
        run.wait()
    last = Run(options | {"workers": 1})
    assert last.wait() == 0, last.text
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("flush", [3, 8, 10, 17])
@pytest.mark.promise("exact-resume")
def test_killed_while_saving(base: dict[str, Any], uninterrupted: Path, tmp_path: Path, flush: int) -> None:
    """Killed before a file, the directory or the rename reaches the disk: the checkpoint before is used."""
    options = base | {"out": str(tmp_path / "run"), "resume": True}
    assert Run(options, kill_at_flush=flush).wait() == -signal.SIGKILL
    left = latest_valid(tmp_path / "run" / "checkpoints", report=pytest.fail)
    assert (left is None) == (flush < 10)  # eight files and the directory; the rename comes before the folder's flush
    run = Run(options)
    assert run.wait() == 0, run.text
    assert ("no checkpoint yet: the 2 steps of its log are done again" in run.text) == (left is None)
    assert_same(tmp_path / "run", uninterrupted)
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.promise("whole-results")
def test_killed_while_saving_the_detector(base: dict[str, Any], tmp_path: Path) -> None:
    """What a kill leaves of a detector half written is removed when the run goes on: it would fill disks in time."""
    options = base | {"out": str(tmp_path / "run"), "resume": True, "save_every": 1, "steps": 10_000}
    hidden = lambda: [path.name for path in (tmp_path / "run").glob(".*") if path.is_dir()]  # noqa: E731
    for _ in range(10):
        run = Run(options)
        while run.process.is_alive() and not hidden():
            time.sleep(0.0005)
        run.signal(signal.SIGKILL)
        run.wait()
        if hidden():
            break
    assert hidden(), "no kill came in time"
    step = logged(tmp_path / "run")[-1]["step"]
    again = Run(options | {"steps": step + 2})
    assert again.wait() == 0, again.text
    assert not hidden()


@pytest.mark.promise("preemption")
def test_preempted_refused_and_continued(base: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    """Asked to stop, it saves at the end of the step and exits with 75; meanwhile a second run there is refused."""
    options = base | {"out": str(tmp_path / "run"), "save_every": 100, "steps": 10_000, "workers": 1}
    run = Run(options)
    run.until_step(2)
    second = Run(options | {"resume": True})
    assert second.wait() == 2
    assert "another run" in second.text
    run.signal((signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)[time.time_ns() % 3])
    assert run.wait() == 75, run.text
    step = logged(tmp_path / "run")[-1]["step"]
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [f"checkpoint-{step}"]
    again = Run(options | {"steps": max(step, 8)})
    assert again.wait() == 2
    assert "--resume" in again.text
    assert Run(options | {"resume": True, "steps": max(step, 8), "workers": 0}).wait() == 0
    assert logged(tmp_path / "run")[:4] == logged(uninterrupted)[:4]


def command(*words: str) -> subprocess.Popen:
    """``siamese-detr`` as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "siamese_detr.cli", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.promise("preemption")
def test_preempted_before_the_first_step(base: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    """Asked to stop while it starts, or computes proposals, the command ends with 75 and a line, as in training; then
    `--resume auto` takes it up."""
    options = base | {"out": str(tmp_path / "run")}
    words = [word for k, v in options.items() if not isinstance(v, bool) for word in (f"--{k}", str(v))]
    words += ["--no-progress", "--resume", "auto"]
    begun = command("pretrain", *words)
    while begun.poll() is None and not (tmp_path / "run" / "config.yaml").exists():
        time.sleep(0.001)
    begun.send_signal(signal.SIGUSR1)
    assert begun.wait(60) == 75
    assert "SIGUSR1" in begun.stderr.read()
    again = command("pretrain", *words)
    while again.poll() is None and not logged(tmp_path / "run"):
        time.sleep(0.005)
    again.send_signal(signal.SIGTERM)
    assert again.wait(60) in (0, 75)
    if again.returncode:
        assert re.search(r"SIGTERM: saved at step \d+ of 8.*--resume", again.stderr.read())
    last = Run(options | {"resume": True})
    assert last.wait() == 0, last.text
    assert logged(tmp_path / "run") == logged(uninterrupted)


@pytest.mark.promise("one-run")
def test_two_started_at_once(base: dict[str, Any], uninterrupted: Path, tmp_path: Path) -> None:
    """Into one new directory: one runs, the other is refused."""
    runs = [Run(base | {"out": str(tmp_path / "run")}) for _ in range(2)]
    assert sorted(str(run.wait()) for run in runs) == ["0", "2"], runs[0].text
    assert logged(tmp_path / "run") == logged(uninterrupted)


@pytest.mark.promise("processes")
def test_several_processes(base: dict[str, Any], tmp_path: Path) -> None:
    """Two processes compute what one does with the same global batch, and one continues what two began."""
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "steps": 4, "lr": 1e-5}
    options = base | still | {"out": str(tmp_path / "two"), "accumulate": 1}
    alone = Run(options | {"out": str(tmp_path / "one")})
    together = team(options, 2)
    assert alone.wait() == 0, alone.text
    assert [run.wait() for run in together] == [0, 0], together[0].text + together[1].text
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        losses = {name: value for name, value in one.items() if name.startswith("loss")}
        assert {name: two[name] for name in losses} == pytest.approx(losses, rel=2e-4)
    assert logged(tmp_path / "one")[0]["loss"] == pytest.approx(logged(tmp_path / "two")[0]["loss"], rel=5e-6)
    more = Run(options | {"out": str(tmp_path / "two"), "steps": 6, "resume": True})
    assert more.wait() == 0, more.text
    assert logged(tmp_path / "two")[-1]["step"] == 6
