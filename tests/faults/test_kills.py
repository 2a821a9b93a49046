"""Fine-tuning and comparisons killed for real, at random moments, and started again.

The moments come from ``SIAMESE_DETR_SEED``, or from the clock; a failure names the seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tiny_finetuning
from conftest import slow, textured
from runs import TINY as PRETRAIN
from runs import Run, logged
from siamese_detr.runtime.checkpoint import list_checkpoints

PATIENCE = 300
SEED = int(os.environ.get("SIAMESE_DETR_SEED", time.time_ns() % 10**6))
SMALL: dict[str, Any] = {"backbone": "random:test_efficientnet", "hidden_size": 16, "heads": 2, "dropout": 0.1}


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_finetuning.write_scenes(tmp_path_factory.mktemp("kills") / "scenes", 6))


def assert_same_run(one: Path, other: Path) -> None:
    """All that two finished fine-tunings left is the same, bit for bit."""
    assert logged(one) == logged(other), f"seed {SEED}"
    assert (one / "history.jsonl").read_text() == (other / "history.jsonl").read_text(), f"seed {SEED}"
    newest = [list_checkpoints(out / "checkpoints")[-1] for out in (one, other)]
    for name in ("model", "optimizer"):
        ours, theirs = (load_file(checkpoint / f"{name}.safetensors") for checkpoint in newest)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), f"seed {SEED}"
    for name in ("best", "last"):
        ours, theirs = (load_file(out / name / "model.safetensors") for out in (one, other))
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), f"seed {SEED}"


@pytest.mark.parametrize("detector", ["conditional-detr", pytest.param("rt-detr", marks=slow)])
@pytest.mark.promise("exact-resume")
def test_fine_tuning_killed_at_random_moments(labels: str, tmp_path: Path, detector: str) -> None:
    """kill -9 in steps, evaluations and saves, other numbers of data workers each time."""
    options = tiny_finetuning.TINY | tiny_finetuning.QUICK | SMALL | {"detector": detector, "crop": 0.5}
    options |= {"train": labels, "val": labels, "steps": 12, "save_every": 1, "eval_every": 3, "backbone_lr": 1e-4}
    whole = Run(options | {"out": str(tmp_path / "whole")}, verb="finetune")
    assert whole.wait(PATIENCE) == 0, whole.text
    moments = random.Random(SEED)
    killed = options | {"out": str(tmp_path / "run"), "resume": True}
    for attempt in range(4):
        run = Run(killed | {"workers": attempt % 3}, verb="finetune")
        run.until_step(3 * attempt + 1, PATIENCE)
        time.sleep(moments.uniform(0, 0.4))
        with contextlib.suppress(ProcessLookupError):  # it has come to its end
            run.signal(signal.SIGKILL)
        run.wait(PATIENCE)
    last = Run(killed | {"workers": 1}, verb="finetune")
    assert last.wait(PATIENCE) == 0, last.text
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.promise("exact-resume")
def test_killed_while_features_are_banked(tmp_path: Path) -> None:
    """Once before and once after entries are marked as present: the same bank and the same run, byte for byte."""
    from siamese_detr.proposals.propose import propose

    (tmp_path / "photos").mkdir()
    for n in range(150):
        textured(n, 120, 90).save(tmp_path / "photos" / f"{n:03}.jpg")
    propose(images=str(tmp_path / "photos"), out=str(tmp_path / "store"), method="random", workers=1)
    options = PRETRAIN | {"images": str(tmp_path / "photos"), "proposals": str(tmp_path / "store"), "resume": True}
    options |= {"feature_bank": 2, "keep_bank": True}
    whole = Run(options | {"out": str(tmp_path / "whole")})
    assert whole.wait(PATIENCE) == 0, whole.text
    state = lambda: next((tmp_path / "run").glob("feature_bank/*/state"), None)  # noqa: E731
    for least in (0, 128):
        run = Run(options | {"out": str(tmp_path / "run")})
        while run.process.is_alive() and (state() is None or np.count_nonzero(np.fromfile(state(), "u1")) < least):
            time.sleep(0.001)
        run.signal(signal.SIGKILL)
        assert run.wait(PATIENCE) == -signal.SIGKILL, run.text
    assert np.count_nonzero(np.fromfile(state(), "u1")) < 300, "too late to kill"
    last = Run(options | {"out": str(tmp_path / "run"), "workers": 1})
    assert last.wait(PATIENCE) == 0, last.text
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    banks = [next((tmp_path / name).glob("feature_bank/*")) for name in ("run", "whole")]
    assert all((banks[0] / file.name).read_bytes() == file.read_bytes() for file in banks[1].iterdir())


@pytest.mark.promise("whole-results")
def test_an_export_killed(tmp_path: Path) -> None:
    """It leaves no detector under the name, or a whole one; the next export clears away the half of this one."""
    from tiny_detectors import tiny_detector

    detector, out = tmp_path / "detector", tmp_path / "out"
    tiny_detector("conditional-detr").save(detector)
    options = {"model": str(detector), "out": str(out)}
    hidden = lambda: [path.name for path in out.glob(".*")]  # noqa: E731
    for _ in range(10):
        run = Run(options, verb="export")
        while run.process.is_alive() and not hidden():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            run.signal(signal.SIGKILL)
        if run.wait(PATIENCE) == -signal.SIGKILL and hidden():
            break
    assert hidden(), "no kill came in time"
    assert not (out / "config.json").exists()
    again = Run(options, verb="export")
    assert again.wait(PATIENCE) == 0, again.text
    assert not hidden()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, detector))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.promise("whole-results")
def test_a_prediction_killed(labels: str, tmp_path: Path) -> None:
    """While it writes a picture: what is there under its name is whole, and the next prediction writes the rest."""
    from PIL import Image

    from tiny_detectors import tiny_detector

    tiny_detector("conditional-detr").save(tmp_path / "detector", shortest_edge=96)
    options = {"model": str(tmp_path / "detector"), "images": str(Path(labels).with_suffix("")), "threshold": 0.0}
    options |= {"out": str(tmp_path / "out"), "workers": 0, "batch_size": 1, "device": "cpu"}
    files = lambda: [path for path in (tmp_path / "out").rglob("*") if path.is_file()]  # noqa: E731
    hidden = lambda: list((tmp_path / "out" / "pictures").glob(".*"))  # noqa: E731
    for _ in range(10):
        run = Run(options, verb="predict")
        while run.process.is_alive() and not hidden():
            pass
        with contextlib.suppress(ProcessLookupError):
            run.signal(signal.SIGKILL)
        if run.wait(PATIENCE) == -signal.SIGKILL and hidden():
            break
    assert hidden(), "no kill came in time"
    for path in set(files()) - set(hidden()):
        json.loads(path.read_text()) if path.suffix == ".json" else Image.open(path).load()
    again = Run(options, verb="predict")
    assert again.wait(PATIENCE) == 0, again.text
    assert len(files()) == 6 + 2
    assert not hidden()


@slow
@pytest.mark.promise("exact-resume")
def test_a_comparison_killed_and_started_again(labels: str, tmp_path: Path) -> None:
    """Killed in its second cell, and started again at once: the first is kept, the second ends as if uninterrupted."""
    import yaml

    from siamese_detr.training.finetune import finetune

    images = str(Path(labels).with_suffix(""))
    out = tmp_path / "out"
    detector = {k: v for k, v in (tiny_finetuning.TINY | SMALL).items()}
    quick = {k: v for k, v in tiny_finetuning.QUICK.items() if k not in ("progress", "backbone", "detector")}
    training = quick | {"steps": 40, "save_every": 2, "eval_every": 20}
    options = {"images": images, "train": labels, "val": labels, "out": str(out), "inits": ["scratch"]}
    options |= {"fractions": [1.0], "seeds": [0, 1], "pretrain": detector, "finetune": training, "parallel": 1}
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(options))

    def start() -> subprocess.Popen:
        with open(tmp_path / "log", "a") as log:
            command = [sys.executable, "-m", "siamese_detr.cli", "compare", "--config", str(config)]
            return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)

    def cell(seed: int) -> Path:
        found = [path.parent for path in (out / "cells" / "scratch" / "1" / str(seed)).glob("*/config.yaml")]
        return found[0] if found else tmp_path / "nowhere"

    process = start()
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None and len(logged(cell(1))) < 3:
        time.sleep(0.01)
    time.sleep(random.Random(SEED).uniform(0, 0.1))
    process.kill()
    process.wait()
    assert cell(1).exists(), (tmp_path / "log").read_text()[-3000:]
    assert not (cell(1) / "metrics.json").exists() or len(logged(cell(1))) < 40, f"too late to kill; seed {SEED}"
    before = {path: path.stat().st_mtime_ns for path in sorted(cell(0).rglob("*")) if path.is_file()}
    assert start().wait(PATIENCE) == 0, (tmp_path / "log").read_text()[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = json.loads((out / "results.json").read_text())
    assert "failed" not in json.dumps(results), (tmp_path / "log").read_text()[-3000:]
    assert len((cell(1) / "sessions.jsonl").read_text().splitlines()) >= 2

    again = yaml.safe_load((cell(1) / "config.yaml").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = finetune(**again | {"out": str(tmp_path / "whole"), "resume": False, "progress": False})
    finally:
        torch.set_num_threads(threads)
    assert (cell(1) / "history.jsonl").read_text() == (whole.out / "history.jsonl").read_text(), f"seed {SEED}"
    assert logged(cell(1)) == logged(whole.out)
