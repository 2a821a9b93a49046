"""Run commands that depend on each other, side by side on the devices there are; one failing does not stop the
others."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from siamese_detr.runtime.cores import usable_cores
from siamese_detr.runtime.signals import Preempted

Outcome = Literal["done", "failed", "skipped"]


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: unique among the jobs.
        command: program and arguments.
        output: file that receives its standard output and error.
        needs: names of the jobs that must have succeeded before.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Args:
        outcome: done, failed, or skipped because a job it needs did not succeed.
        reason: for the last two, one line.
        seconds: wall time.
    """

    outcome: Outcome
    reason: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Slot:
    """A place where one job runs at a time: the environment variables that confine it to its device."""

    environment: Mapping[str, str]


class Stopped(Preempted):
    """The jobs were asked to stop (SIGTERM) and have ended; the same command goes on later."""

    def __init__(self) -> None:
        super().__init__("SIGTERM: the runs under way have saved themselves; the same command goes on")


def device_slots(parallel: int | None = None) -> list[Slot]:
    """One slot per visible GPU, or one on the CPU.

    Args:
        parallel: number of slots instead; they share the GPUs, or the CPU's cores, evenly.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [name for name in visible.split(",") if name] if visible else []
    if visible is None:
        devices = [str(number) for number in range(torch.cuda.device_count())]
    if devices:
        return [Slot({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]}) for i in range(parallel or len(devices))]
    count = parallel or 1
    if count == 1 or "OMP_NUM_THREADS" in os.environ:
        return [Slot({})] * count
    return [Slot({"OMP_NUM_THREADS": str(max(usable_cores() // count, 1))})] * count


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    finished: Callable[[Job, Ended], None] = lambda job, ended: None,
    done: Sequence[str] = (),
) -> dict[str, Ended]:
    """Run every job whose needs succeed, in the order given, one per slot at a time.

    Args:
        finished: told of each job as it ends, in this process, before jobs that need it start. If it raises
            an exception the job counts as failed.
        done: names that ``needs`` may mention and that have been done before.

    Raises:
        ValueError: a need is no job's name, or jobs need each other in a circle.
        Stopped: SIGTERM came; the running jobs were passed it and have ended.
        KeyboardInterrupt: likewise.
    """
    results: dict[str, Ended] = {name: Ended("done") for name in done}
    waiting = list(jobs)
    free = list(slots)
    running: list[tuple[Job, Slot, subprocess.Popen[bytes], float]] = []

    def end(job: Job, ended: Ended) -> None:
        try:
            finished(job, ended)
        except Exception as error:
            ended = Ended("failed", " ".join(str(error).split()) or type(error).__name__, ended.seconds)
            finished(job, ended)
        results[job.name] = ended

    with stop_requests() as stopping:
        try:
            while waiting or running:
                if stopping():
                    raise Stopped
                for job in list(waiting):
                    lacking = [name for name in job.needs if name in results and results[name].outcome != "done"]
                    if lacking:
                        waiting.remove(job)
                        end(job, Ended("skipped", f"{lacking[0]}: {results[lacking[0]].reason}"))
                    elif free and all(name in results for name in job.needs):
                        waiting.remove(job)
                        slot = free.pop(0)
                        running.append((job, slot, start(job, slot), time.monotonic()))
                for entry in list(running):
                    job, slot, process, began = entry
                    if process.poll() is None:
                        continue
                    running.remove(entry)
                    free.append(slot)
                    seconds = time.monotonic() - began
                    if process.returncode == 0:
                        end(job, Ended("done", "", seconds))
                    else:
                        end(job, Ended("failed", failure(process.returncode, job.output), seconds))
                if running:
                    time.sleep(0.05)
                elif waiting and not any(set(job.needs) <= results.keys() for job in waiting):
                    raise ValueError(f"{waiting[0].name} needs what is no job, or itself: {waiting[0].needs}")
        finally:
            stop([process for _, _, process, _ in running])
    return {job.name: results[job.name] for job in jobs}


def start(job: Job, slot: Slot) -> subprocess.Popen[bytes]:
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, "ab") as output:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot.environment},
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent is killed: no orphan goes on writing into what a restart continues."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def stop(processes: Sequence[subprocess.Popen[bytes]], patience: float = 120.0) -> None:
    """SIGTERM, upon which runs save themselves; SIGKILL for what is still there after ``patience`` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Context giving a function that tells whether SIGTERM came (only where Python lets us listen: the main thread)."""
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True

    try:
        previous = signal.signal(signal.SIGTERM, note)
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, previous)


def failure(code: int, output: Path) -> str:
    """One line telling why a command failed: the last line it wrote, else how it ended."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        with open(output, "rb") as file:
            file.seek(max(output.stat().st_size - 8192, 0))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"{how}: {lines[-1][:300]}" if lines else how
