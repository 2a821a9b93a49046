"""Several processes: the results of one, a clear end when one is lost, and going on with any number of them.

They talk over the loopback interface, as machines do over theirs. Tests of four processes and of torchrun's restarts
take a minute on two cores and run where SIAMESE_DETR_SLOW_TESTS is set.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_finetuning
from conftest import slow, textured
from runs import TINY, Run, logged, team
from siamese_detr.runtime.checkpoint import list_checkpoints

PATIENCE = 60  # seconds; the machine may be busy
STARTING = 240  # seconds for torchrun to start processes, each of which imports everything, and for these to train


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run without dropout on 16 images, one of them unreadable: processes get shares of different size."""
    from siamese_detr.proposals.propose import propose

    root = tmp_path_factory.mktemp("distributed")
    photos = root / "photos"
    photos.mkdir()
    for n in range(16):
        textured(n, *((120, 90) if n % 3 else (90, 120))).save(photos / f"{n:02}.jpg")
    propose(images=str(photos), out=str(root / "store"), method="random", workers=1)
    (photos / "05.jpg").write_bytes((photos / "05.jpg").read_bytes()[:700])
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "lr": 1e-5, "batch_size": 8}
    still["schedule"] = "constant"  # so that runs of different lengths learn alike
    return TINY | still | {"images": str(photos), "proposals": str(root / "store"), "max_bad_share": 0.5, "steps": 6}


@pytest.fixture(scope="module")
def alone(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    run = Run(base | {"out": str(out)})
    assert run.wait(PATIENCE) == 0, run.text
    return out


def assert_alike(out: Path, other: Path, first: float = 5e-6, later: float = 2e-4) -> None:
    """The same losses: nearly to float32's precision at the first step, which rounding has not yet spread from."""
    ours, theirs = logged(out), logged(other)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for step, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        losses = {name: value for name, value in two.items() if name.startswith("loss")}
        found = {name: one[name] for name in losses}
        assert found == pytest.approx(losses, rel=later if step else first, abs=1e-6)


def skipped(out: Path) -> list[tuple[int, str]]:
    lines = (out / "skipped.jsonl").read_text().splitlines()
    return sorted((record["step"], record["path"]) for record in map(json.loads, lines))


def ends(runs: list[Run]) -> list[int | None]:
    return [run.wait(PATIENCE) for run in runs]


@slow
@pytest.mark.promise("processes")
def test_four_processes_train_as_one(base: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    runs = team(base | {"out": str(tmp_path / "run")}, 4)
    assert ends(runs) == [0] * 4, "".join(run.text for run in runs)
    assert_alike(tmp_path / "run", alone)
    assert skipped(tmp_path / "run") == skipped(alone) != []
    # Views of many sizes: every process pads its share to another size.
    readable = tmp_path / "readable.txt"
    readable.write_text("\n".join(str(path) for path in sorted(Path(base["images"]).iterdir()) if path.stem != "05"))
    options = base | {"images": str(readable), "view_size": None, "short_sides": (40, 48, 56), "max_size": 80}
    runs = [*team(options | {"out": str(tmp_path / "four")}, 4), Run(options | {"out": str(tmp_path / "one")})]
    assert ends(runs) == [0] * 5, "".join(run.text for run in runs)
    assert_alike(tmp_path / "four", tmp_path / "one")


@pytest.mark.promise("bad-images")
def test_a_process_with_nothing_readable(base: dict[str, Any], tmp_path: Path) -> None:
    """The micro-batch is left out by all, wherever in an update it comes; the processes stay in step and agree."""
    from siamese_detr.proposals.propose import propose

    photos, store = tmp_path / "photos", tmp_path / "store"
    shutil.copytree(base["images"], photos)
    shutil.copy(photos / "08.jpg", photos / "05.jpg")  # readable while the boxes are proposed
    propose(images=str(photos), out=str(store), method="random", workers=1)
    for n in (1, 2, 4, 5, 7, 8, 11, 13):
        (photos / f"{n:02}.jpg").write_bytes(b"gone")
    options = base | {"images": str(photos), "proposals": str(store), "steps": 12, "accumulate": 2, "batch_size": 8}
    options["lr"] = 1e-3
    runs = team(options | {"out": str(tmp_path / "run")}, 2)
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    records = logged(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 13))
    assert all("loss" in record for record in records[-3:])  # which the comparison below needs
    assert len({path for _, path in skipped(tmp_path / "run")}) == len(skipped(tmp_path / "run")) == 8
    # Gradients that the processes had not put together would set their weights apart; a resumed run has one's for all.
    first = team(options | {"out": str(tmp_path / "again"), "steps": 9}, 2)
    assert ends(first) == [0, 0], first[0].text + first[1].text
    again = team(options | {"out": str(tmp_path / "again"), "resume": True}, 2)
    assert ends(again) == [0, 0], again[0].text + again[1].text
    whole = team(options | {"out": str(tmp_path / "whole")}, 2)
    assert ends(whole) == [0, 0], whole[0].text + whole[1].text
    assert logged(tmp_path / "again") == logged(tmp_path / "whole")
    assert skipped(tmp_path / "again") == skipped(tmp_path / "whole")


@pytest.mark.promise("lost-process")
def test_one_killed_ends_all_and_another_number_goes_on(base: dict[str, Any], alone: Path, tmp_path: Path) -> None:
    """Two processes refuse two more, die together, and are continued by one, whose run two others finish."""
    options = base | {"out": str(tmp_path / "run"), "resume": True, "save_every": 1, "steps": 10_000}
    runs = team(options, 2)
    runs[0].until_step(2, PATIENCE)
    intruders = team(options | {"out": str(tmp_path / "run")}, 2)
    assert ends(intruders) == [2, 2]
    victim = random.Random(time.time_ns()).randrange(2)
    began = time.monotonic()
    runs[victim].signal(signal.SIGKILL)
    assert runs[victim].wait(60) == -signal.SIGKILL
    survivor = runs[1 - victim]
    assert survivor.wait(60) == 2, survivor.text
    assert time.monotonic() - began < 60
    assert "another process of this run ended" in survivor.text
    assert "Traceback" not in survivor.text

    step = max(logged(tmp_path / "run")[-1]["step"], 4) + 1
    one = Run(options | {"steps": step})
    assert one.wait(PATIENCE) == 0, one.text
    two = team(options | {"steps": step + 1}, 2)
    assert ends(two) == [0, 0], two[0].text + two[1].text
    assert logged(tmp_path / "run")[-1]["step"] == step + 1
    shorter = {record["step"]: record for record in logged(alone)}
    for record in logged(tmp_path / "run"):
        if record["step"] in shorter:
            assert record["loss"] == pytest.approx(shorter[record["step"]]["loss"], rel=2e-4)


@pytest.mark.promise("preemption")
def test_one_asked_to_stop_stops_all(base: dict[str, Any], tmp_path: Path) -> None:
    """A signal to any one process saves at the end of the step that all are in."""
    runs = team(base | {"out": str(tmp_path / "run"), "steps": 10_000, "save_every": 5000}, 2)
    runs[0].until_step(1, PATIENCE)
    runs[1].signal(signal.SIGUSR1)
    assert ends(runs) == [75, 75], runs[0].text + runs[1].text
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 1


@pytest.mark.promise("preemption")
def test_one_asked_to_stop_in_an_evaluation_stops_all(tmp_path: Path) -> None:
    """Long before the evaluation is done, which the run does again when it goes on."""
    labels = str(tiny_finetuning.write_scenes(tmp_path / "scenes", count=4))
    options = tiny_finetuning.TINY | tiny_finetuning.QUICK | {"train": labels, "out": str(tmp_path / "run")}
    options |= {"val": str(tiny_finetuning.write_scenes(tmp_path / "many", count=101)), "eval_batch_size": 1}
    options |= {"steps": 4, "eval_every": 2, "save_every": 100, "resume": True}
    runs = team(options, 2, verb="finetune")
    runs[0].until_step(2, PATIENCE)
    runs[1].signal(signal.SIGTERM)
    assert ends(runs) == [75, 75], runs[0].text + runs[1].text
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / "metrics.json").exists()
    runs = team(options, 2, verb="finetune")
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    history = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in history] == [2, 4]


@pytest.mark.promise("processes")
def test_fine_tuning_and_evaluation_in_two_processes(tmp_path: Path) -> None:
    """The losses and the AP of one process; the verb ``evaluate`` shares its images too."""
    labels = str(tiny_finetuning.write_scenes(tmp_path / "scenes", count=6))
    options = tiny_finetuning.TINY | tiny_finetuning.QUICK
    validation = str(tiny_finetuning.write_scenes(tmp_path / "validation", count=6, seed=1))
    for n in (0, 1):  # one in the share of each process
        (tmp_path / "validation" / f"{n}.jpg").write_bytes(b"gone")
    options |= {"train": labels, "val": validation, "steps": 4, "eval_every": 4, "flip": 0.0, "lr": 1e-4}
    options |= {"backbone": "random:test_efficientnet", "hidden_size": 16, "heads": 2, "eval_batch_size": 1}
    alone = Run(options | {"out": str(tmp_path / "one")}, verb="finetune")
    assert alone.wait(PATIENCE) == 0, alone.text
    runs = team(options | {"out": str(tmp_path / "two")}, 2, verb="finetune")
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    assert_alike(tmp_path / "two", tmp_path / "one")

    listed = [(tmp_path / run / "skipped-validation.jsonl").read_text() for run in ("one", "two")]
    assert listed[0] == listed[1]
    assert listed[0].count("\n") == 2

    measure = {"model": str(tmp_path / "one" / "last"), "labels": validation, "device": "cpu", "batch_size": 1}
    for name, runs in {
        "a": [Run(measure | {"out": str(tmp_path / "a.json")}, verb="evaluate")],
        "b": team(measure | {"out": str(tmp_path / "b.json")}, 2, verb="evaluate"),
    }.items():
        assert set(ends(runs)) == {0}, name + runs[0].text
        assert "2 of 6 images cannot be read" in runs[0].text
    assert json.loads((tmp_path / "a.json").read_text()) == json.loads((tmp_path / "b.json").read_text())


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.promise("non-finite")
def test_a_nan_in_any_process_stops_all_before_the_update(
    base: dict[str, Any], tmp_path: Path, everywhere: bool
) -> None:
    """In the second process alone, or in all at once (weights that a rate without measure threw to infinity)."""
    options = base | {"out": str(tmp_path / "run"), "save_every": 1}
    env = {"POISON": "1"}
    if everywhere:
        options, env = options | {"lr": 1e30}, {}
    runs = team(options, 2, env=env)
    assert ends(runs) == [2, 2], runs[0].text + runs[1].text
    told = [line for run in runs for line in run.text.splitlines() if "stopped before the update" in line]
    assert told, runs[0].text + runs[1].text
    assert "Traceback" not in runs[0].text + runs[1].text
    assert "with: torchrun --nproc-per-node=2 -m siamese_detr.cli pretrain --config " in told[0]
    document = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert document["processes"] == 2
    assert [len(batch) for batch in document["samples"]] == [8]
    step = logged(tmp_path / "run")[-1]["step"]
    assert document["step"] == step
    replayed = team(options | {"replay": str(tmp_path / "run" / "nonfinite.json")}, 2, env=env)
    assert ends(replayed) == [0, 0], replayed[0].text + replayed[1].text
    text = replayed[0].text + replayed[1].text
    # What one process had is not in the state that is replayed: without it the step is finite.
    assert f"step {step + 1}: " in text
    assert ("not finite: " in text) == everywhere
    one = Run(options | {"replay": str(tmp_path / "run" / "nonfinite.json")})
    assert one.wait(PATIENCE) == 0, one.text
    assert "done by 2 processes, and this is 1" in one.text


@slow
@pytest.mark.promise("lost-process")
def test_torchrun_restarts_after_a_kill(base: dict[str, Any], tmp_path: Path) -> None:
    """With --max-restarts a killed process costs the steps since the checkpoint; the weights are the undisturbed ones.

    SIGTERM to torchrun reaches the processes, which save.
    """
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    verb = ["-m", "siamese_detr.cli", "pretrain", "--resume"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def command(out: str, **changes: Any) -> list[str]:
        options = base | {"out": str(tmp_path / out), "save_every": 2} | changes
        return [word for k, v in options.items() if not isinstance(v, bool) for word in (f"--{k}", str(v))] + [
            "--no-progress"
        ]

    whole = subprocess.run([*run, *verb, *command("whole")], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr[-3000:]

    with open(tmp_path / "log", "w") as log:
        broken = subprocess.Popen(
            [*run, "--max-restarts=2", *verb, *command("broken")], env=environment, stdout=log, stderr=log
        )
        started = lambda: any(record["step"] >= 3 for record in logged(tmp_path / "broken"))  # noqa: E731
        wait_for(started, broken, STARTING)
        assert started(), (tmp_path / "log").read_text()[-3000:]
        os.kill(int((tmp_path / "broken" / ".lock").read_text().split()[1]), signal.SIGKILL)
        assert broken.wait(STARTING) == 0, (tmp_path / "log").read_text()[-3000:]
    sessions = (tmp_path / "broken" / "sessions.jsonl").read_text().splitlines()
    assert len(sessions) == 2
    assert logged(tmp_path / "broken") == logged(tmp_path / "whole")
    weights = [
        load_file(list_checkpoints(tmp_path / name / "checkpoints")[-1] / "model.safetensors")
        for name in ("broken", "whole")
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())

    with open(tmp_path / "log", "w") as log:
        asked = subprocess.Popen(
            [*run, *verb, *command("asked", steps=10_000, save_every=5000)], env=environment, stdout=log, stderr=log
        )
        wait_for(lambda: bool(logged(tmp_path / "asked")), asked, STARTING)
        asked.terminate()
        asked.wait(PATIENCE)
    assert len(list_checkpoints(tmp_path / "asked" / "checkpoints")) == 1, (tmp_path / "log").read_text()[-3000:]


@slow
@pytest.mark.promise("lost-process")
def test_torchrun_goes_on_with_fewer_machines(base: dict[str, Any], tmp_path: Path) -> None:
    """Of two machines (here: two torchruns on one) one is lost for good: the other continues alone, to the losses of
    one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = base | {"out": str(tmp_path / "run"), "save_every": 5, "schedule": "constant", "steps": 120}
    words = [word for k, v in options.items() if not isinstance(v, bool) for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(number: int) -> subprocess.Popen:
        host = f"--rdzv-conf=is_host={number == 0},last_call_timeout=20,keep_alive_interval=1,keep_alive_max_attempt=3"
        verb = ["-m", "siamese_detr.cli", "pretrain", "--resume", *words, "--no-progress"]
        with open(tmp_path / f"log{number}", "w") as log:
            return subprocess.Popen([*command, host, *verb], env=environment, stdout=log, stderr=log)

    machines = [start(0), start(1)]
    try:
        wait_for(lambda: any(record["step"] >= 5 for record in logged(tmp_path / "run")), machines[0], STARTING)
        lost = machines[1].pid
        workers = Path(f"/proc/{lost}/task/{lost}/children").read_text().split()
        assert workers
        for process in (lost, *map(int, workers)):  # the launcher and its process: the machine is gone
            os.kill(process, signal.SIGKILL)
        # The launcher itself waits five minutes more for the lost one before it ends.
        text = (tmp_path / "log0").read_text
        wait_for(lambda: "pre-trained for 120 steps" in text(), machines[0], STARTING)
        assert "pre-trained for 120 steps" in text(), text()[-3000:]
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait(PATIENCE)
    assert len((tmp_path / "run" / "sessions.jsonl").read_text().splitlines()) >= 2
    whole = Run(options | {"out": str(tmp_path / "whole")})
    assert whole.wait(PATIENCE) == 0, whole.text
    assert_alike(tmp_path / "run", tmp_path / "whole", later=2e-3)


def wait_for(condition: Any, process: subprocess.Popen, patience: float = PATIENCE) -> None:
    end = time.monotonic() + patience
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
