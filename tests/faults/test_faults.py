"""What machines do to long runs: disks fill up and vanish, processes are killed, memory ends.

Real processes and real faults; each must end the run with one clear line, leave the last checkpoint intact, and be got
over by the same command with --resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_finetuning
from conftest import slow, textured
from runs import TINY, Run, logged
from siamese_detr.detectors.structures import OF_NEW
from siamese_detr.errors import UserError
from siamese_detr.runtime.checkpoint import latest_valid, list_checkpoints, verify
from siamese_detr.runtime.processes import machine_explained
from tiny_detectors import CASES, tiny_detector

PATIENCE = 120
ENDLESS = 10_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Options of an endless tiny run on eight images."""
    from siamese_detr.proposals.propose import propose

    root = tmp_path_factory.mktemp("faults")
    (root / "photos").mkdir()
    for n in range(8):
        textured(n, 120, 90).save(root / "photos" / f"{n}.jpg")
    propose(images=str(root / "photos"), out=str(root / "store"), method="random", workers=1)
    images = {"images": str(root / "photos"), "proposals": str(root / "store")}
    return TINY | images | {"steps": ENDLESS, "resume": True, "schedule": "constant"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)):
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def mount(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def assert_continues(options: dict[str, Any]) -> None:
    """What the fault left is intact, and --resume goes on from there, three steps."""
    out = Path(options["out"])
    newest = latest_valid(out / "checkpoints", report=pytest.fail)
    step = 0
    if newest is not None:
        verify(newest)
        step = int(newest.name.rpartition("-")[2])
    again = Run(options | {"steps": step + 3})
    assert again.wait(PATIENCE) == 0, again.text
    assert logged(out)[-1]["step"] == step + 3


def assert_clear(run: Run, *words: str) -> None:
    """The run ends by itself, with exit code 2 and one line that says what happened."""
    assert run.wait(PATIENCE) == 2, run.text
    errors = [line for line in run.text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, run.text
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in run.text


def on(disk: Path, tmp_path: Path) -> str:
    """A run directory on that disk, by a link: the process's own output goes beside the link."""
    (disk / "run").mkdir()
    (tmp_path / "run").symlink_to(disk / "run")
    return str(tmp_path / "run")


@pytest.mark.promise("machine")
def test_a_full_disk(base: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    options = base | {"out": on(small_disk, tmp_path)}
    run = Run(options)
    run.until_step(3, PATIENCE)
    filler = small_disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        block = b"\0" * 4096
        while run.process.is_alive():
            try:
                file.write(block * 256)
            except OSError:
                block = block[: len(block) // 2] or b"\0"
                time.sleep(0.01)
    assert_clear(run, "No space left")
    filler.unlink()
    assert_continues(options)


def test_a_full_disk_that_tensorboard_meets_first(base: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    board = tmp_path / "run" / "tensorboard"
    options = base | {"out": str(board.parent), "steps": 2}
    first = Run(options)
    assert first.wait(PATIENCE) == 0, first.text
    shutil.rmtree(board)
    board.symlink_to(small_disk)
    disk = os.statvfs(small_disk)
    with open(small_disk / "filler", "wb") as file:
        file.write(b"\0" * (disk.f_bavail * disk.f_frsize))
    assert_clear(Run(options | {"steps": 4, "resume": True}), "No space left", "--resume")


@pytest.mark.promise("machine")
def test_a_disk_without_room_for_another_checkpoint(base: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    """The message says to lower ``keep``: that alone, with nothing else removed, lets the run go on."""
    options = base | {"out": on(small_disk, tmp_path), "save_every": 1, "keep": 3}
    first = Run(options | {"steps": 3})
    assert first.wait(PATIENCE) == 0, first.text
    used = sum(path.stat().st_size for path in (small_disk / "run" / "checkpoints").rglob("*")) // 3
    disk = os.statvfs(small_disk)
    with open(small_disk / "filler", "wb") as file:
        file.write(b"\0" * (disk.f_bavail * disk.f_frsize - used // 2))
    assert_clear(Run(options), "No space left", "lower `keep`", "--resume")
    verify(small_disk / "run" / "checkpoints" / "checkpoint-3")
    again = Run(options | {"keep": 1, "steps": 5})
    assert again.wait(PATIENCE) == 0, again.text
    assert [path.name for path in list_checkpoints(small_disk / "run" / "checkpoints")] == ["checkpoint-5"]


def test_a_directory_that_cannot_be_written(base: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    options = base | {"out": on(small_disk, tmp_path)}
    mount("-o", "remount,ro", str(small_disk))
    assert_clear(Run(options), "cannot write into", "Read-only")


def test_images_whose_disk_vanishes(base: dict[str, Any], small_disk: Path, tmp_path: Path) -> None:
    shutil.copytree(base["images"], small_disk / "photos")
    options = base | {"images": str(small_disk / "photos"), "out": str(tmp_path / "run"), "workers": 1}
    options["proposals"] = str(tmp_path / "store")
    from siamese_detr.proposals.propose import propose

    propose(images=options["images"], out=options["proposals"], method="random", workers=1)
    run = Run(options)
    run.until_step(3, PATIENCE)
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    assert_clear(run, "cannot be read", "is the disk still mounted?", "--resume")
    assert_clear(Run(options), "does not exist", str(small_disk))
    shutil.copytree(base["images"], small_disk / "photos")
    assert_continues(options)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


@pytest.mark.promise("machine")
def test_a_data_worker_killed(base: dict[str, Any], tmp_path: Path) -> None:
    """As the kernel does when memory ends."""
    options = base | {"out": str(tmp_path / "run"), "workers": 2}
    run = Run(options)
    run.until_step(3, PATIENCE)
    assert run.process.is_alive(), run.text
    workers = children(run.process.pid)  # type: ignore[arg-type]
    assert len(workers) >= 2
    os.kill(workers[-1], signal.SIGKILL)
    assert_clear(run, "a data process ended", "lower workers", "--resume")
    end = time.monotonic() + 30
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert_continues(options)


SMALL_SHARED_MEMORY = """
import ctypes, json, subprocess, sys

if ctypes.CDLL(None).unshare(0x00020000):  # a mount namespace of its own
    sys.exit(77)
for command in (["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", "/dev/shm"]):
    if subprocess.run(command, capture_output=True).returncode:
        sys.exit(77)
from siamese_detr import load_verb

for verb, options in json.loads(sys.argv[1]):
    load_verb(verb)(**options)
"""


@pytest.mark.promise("machine")
def test_shared_memory_too_small_for_a_batch(base: dict[str, Any], tmp_path: Path) -> None:
    """As in a container: training, a bank of features, fine-tuning with its evaluation, and evaluate need none."""
    labels = str(tiny_finetuning.write_scenes(tmp_path / "scenes", count=4))
    run, tuned = base | {"steps": 2, "workers": 1}, tiny_finetuning.TINY | tiny_finetuning.QUICK
    tuned |= {"train": labels, "val": labels, "out": str(tmp_path / "tuned"), "steps": 1, "workers": 1}
    verbs = [
        ("pretrain", run | {"out": str(tmp_path / "run")}),
        ("pretrain", run | {"out": str(tmp_path / "banked"), "feature_bank": 1}),
        ("finetune", tuned),
        ("evaluate", {"model": str(tmp_path / "tuned"), "labels": labels, "device": "cpu", "workers": 1}),
    ]
    command = [sys.executable, "-c", SMALL_SHARED_MEMORY, json.dumps(verbs)]
    done = subprocess.run(command, timeout=4 * PATIENCE, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("mounting needs root")
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / "run")[-1]["step"] == logged(tmp_path / "banked")[-1]["step"] == 2


def test_a_data_process_that_hangs_holds_up_nobody() -> None:
    """As one does that waits for a lock which another one held when it was killed."""
    program = """
import time
from torch.utils.data import DataLoader
from siamese_detr.runtime.processes import begin_worker

class Hanging:
    def __len__(self):
        return 9
    def __getitem__(self, index):
        return time.sleep(1e6 if index else 0) or index

next(iter(DataLoader(Hanging(), num_workers=1, worker_init_fn=begin_worker)))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=40).returncode == 0


def until_children(run: Run, count: int) -> list[int]:
    """The run's data processes, once there are so many."""
    end = time.monotonic() + PATIENCE
    while run.process.is_alive() and time.monotonic() < end:
        with contextlib.suppress(OSError):
            found = children(run.process.pid)  # type: ignore[arg-type]
            if len(found) >= count:
                return found
        time.sleep(0.001)
    raise AssertionError(run.text)


def ignores_stops(pid: int) -> bool:
    """Whether the process is past its start and ignores SIGTERM (false: it has ended, or means to by the signal)."""
    with contextlib.suppress(OSError):
        (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)
    return False


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Labels of so many pictures that an evaluation takes a second."""
    return str(tiny_finetuning.write_scenes(tmp_path_factory.mktemp("many") / "scenes", 60))


@pytest.mark.promise("machine")
def test_a_data_worker_killed_in_an_evaluation(many: str, tmp_path: Path) -> None:
    detector = tiny_detector("conditional-detr", classes=2)
    detector.save(tmp_path / "detector", class_names=["stripes", "dots"], shortest_edge=96)
    options = {"model": str(tmp_path / "detector"), "labels": many, "out": str(tmp_path / "metrics.json")}
    run = Run(options | {"device": "cpu", "workers": 1, "batch_size": 1}, verb="evaluate")
    (worker,) = until_children(run, 1)
    time.sleep(0.2)
    os.kill(worker, signal.SIGKILL)
    assert_clear(run, "a data process ended", "lower workers", "start it again")
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.promise("preemption")
def test_all_processes_asked_to_stop_in_an_evaluation(many: str, tmp_path: Path) -> None:
    """As clusters do: the data processes too. The evaluation is ended, the run saved, and all goes on."""
    options = tiny_finetuning.TINY | tiny_finetuning.QUICK | {"train": many, "val": many, "out": str(tmp_path / "run")}
    options |= {"steps": 30, "eval_every": 0.1, "save_every": 1000, "eval_batch_size": 1, "workers": 1, "resume": True}
    run = Run(options, verb="finetune")
    processes = [*until_children(run, 2), run.process.pid]
    end = time.monotonic() + PATIENCE
    while not all(map(ignores_stops, processes[:-1])) and time.monotonic() < end:
        time.sleep(0.001)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGTERM)  # type: ignore[arg-type]
    assert run.wait(PATIENCE) == 75, run.text
    (saved,) = list_checkpoints(tmp_path / "run" / "checkpoints")
    verify(saved)
    again = Run(options | {"steps": int(saved.name.rpartition("-")[2]) + 1}, verb="finetune")
    assert again.wait(PATIENCE) == 0, again.text


@pytest.mark.promise("machine")
def test_memory_that_ends(base: dict[str, Any], tmp_path: Path) -> None:
    """The process may take no more memory than it has: whichever allocation fails, it is said."""
    options = base | {"out": str(tmp_path / "run")}
    run = Run(options)
    run.until_step(3, PATIENCE)
    assert run.process.is_alive(), run.text
    resource.prlimit(run.process.pid, resource.RLIMIT_AS, (1 << 20, 1 << 20))  # type: ignore[arg-type]
    code = run.wait(PATIENCE)
    assert code not in (0, None), run.text
    if code == 2:  # else the limit struck inside the interpreter, which then cannot even say so
        assert "memory" in run.text
    assert_continues(options)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=str)
def test_a_data_worker_killed_while_it_hands_a_batch_over(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """What the main process then meets, which a kill brings about only now and then."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    def broken(self: Any) -> Any:
        raise error

    monkeypatch.setattr(_BaseDataLoaderIter, "__next__", broken)
    from siamese_detr.training.pretrain import pretrain

    with pytest.raises(UserError, match=r"a data process ended.*lower workers.*--resume"):
        pretrain(**base | {"out": str(tmp_path / "run"), "steps": 1})


def test_the_death_of_a_data_process_may_be_heard_of_after_its_connection_broke_off() -> None:
    """Heard of later, it would interrupt the cleaning up, and be shown as a traceback."""

    def hear(number: int, frame: Any) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, hear)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(UserError, match=r"pid 1\) is killed by signal.*; go on"), machine_explained("go on"):
            raise ConnectionResetError(104, "Connection reset by peer")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_allocation_too_large(base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from siamese_detr.training.pretrain import PretextTask, pretrain

    def step(self: PretextTask, *args: Any) -> Any:
        return torch.empty(2**50)

    monkeypatch.setattr(PretextTask, "step", step)
    with pytest.raises(UserError, match=r"out of memory.*--resume"):
        pretrain(**base | {"out": str(tmp_path / "run"), "steps": 1})


FAMILIES = tuple(dict.fromkeys(family for family, _ in CASES.values()))
REFUSED = {("lw-detr", "up-detr"), ("rf-detr", "up-detr")}  # they cannot keep queries from each other
METHODS = ("siamese", "up-detr", "detreg", "clusters")
QUICK = {("deformable-detr", "siamese"), ("conditional-detr", "up-detr"), ("detr", "detreg"), ("rt-detr", "clusters")}


@pytest.mark.parametrize(
    ("detector", "method"),
    [
        pytest.param(family, method, marks=() if (family, method) in QUICK else slow)
        for family in FAMILIES
        for method in METHODS
        if (family, method) not in REFUSED
    ],
)
@pytest.mark.promise("exact-resume")
def test_every_detector_and_method_continues_exactly(
    base: dict[str, Any], tmp_path: Path, detector: str, method: str
) -> None:
    """Killed while it writes its second checkpoint, continued with another number of workers: the same bits."""
    options = base | {
        "detector": detector,
        "method": method,
        "steps": 4,
        "save_every": 1,
        "view_size": 64,
        "hidden_size": 32,
        **({"classes": 4} if method == "clusters" else {}),
    }
    if detector in ("lw-detr", "rf-detr"):  # these need a backbone of their own kind
        start = tiny_detector(detector, classes=1, dropout=0.1)
        start.save(tmp_path / "start", shortest_edge=2 * (start.square_side or 1))
        options = {name: value for name, value in options.items() if name not in OF_NEW}
        options |= {"init": str(tmp_path / "start"), "view_size": 96}
    whole = Run(options | {"out": str(tmp_path / "whole")})
    killed = Run(options | {"out": str(tmp_path / "run"), "workers": 1}, kill_at_flush=15)
    assert whole.wait(PATIENCE) == 0, whole.text
    assert killed.wait(PATIENCE) == -signal.SIGKILL, killed.text
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["checkpoint-1"]
    again = Run(options | {"out": str(tmp_path / "run")})
    assert again.wait(PATIENCE) == 0, again.text
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / "checkpoint-4" / f"{name}.safetensors")
            for run in ("run", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
