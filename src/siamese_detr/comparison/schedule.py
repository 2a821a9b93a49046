"""Run commands that depend on each other, side by side on the available devices."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Literal

from siamese_detr.runtime.cores import usable_cores
from siamese_detr.runtime.signals import Preempted, StopRequest

Slot = Mapping[str, str]
"""Environment variables that confine one job at a time to its device."""


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: unique among the jobs.
        command: program and arguments.
        output: file to which its standard output and error are appended.
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

    outcome: Literal["done", "failed", "skipped"]
    reason: str = ""
    seconds: float = 0.0


class Stopped(Preempted):
    """A signal asked the jobs to stop, and they have ended."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name}: the active runs have been stopped and saved; start the same command to continue")


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
        return [{"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} for i in range(parallel or len(devices))]
    count = parallel or 1
    if count == 1 or "OMP_NUM_THREADS" in os.environ:
        return [{}] * count
    return [{"OMP_NUM_THREADS": str(max(usable_cores() // count, 1))}] * count


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Slot],
    finished: Callable[[Job, Ended], None] = lambda job, ended: None,
    waiting: Callable[[], None] = lambda: None,
) -> dict[str, Ended]:
    """Run every job whose needs succeed, the first in the list first, one per slot at a time.

    Args:
        jobs: what to run; a failure skips the jobs that need it, and no others.
        slots: where.
        finished: called in this thread when a job has ended, before any job that needs it starts. If it raises an
            exception, the job counts as failed.
        waiting: called several times a second.

    Returns:
        how each job ended, by name.

    Raises:
        ValueError: a job needs an unknown job, or jobs need each other in a circle.
        Stopped: a signal (SIGTERM, SIGUSR1) came; the running jobs were stopped.
        KeyboardInterrupt: likewise.
    """
    place = {job.name: number for number, job in enumerate(jobs)}
    graph = TopologicalSorter({job.name: job.needs for job in jobs})
    if unknown := {name for job in jobs for name in job.needs} - place.keys():
        raise ValueError(f"{min(unknown)!r} is needed, but there is no job of that name")
    graph.prepare()
    results: dict[str, Ended] = {}
    ready: list[Job] = []
    free = list(slots)
    running: dict[Future[int], tuple[Job, Slot, subprocess.Popen[bytes], float]] = {}

    def end(job: Job, ended: Ended) -> None:
        try:
            finished(job, ended)
        except Exception as error:
            ended = Ended("failed", str(error) or type(error).__name__, ended.seconds)
        results[job.name] = ended
        graph.done(job.name)

    with StopRequest() as stop, ThreadPoolExecutor(len(slots)) as pool:
        try:
            while graph.is_active():
                ready = sorted(
                    [*ready, *(jobs[place[name]] for name in graph.get_ready())], key=lambda j: place[j.name]
                )
                for job in list(ready):
                    broken = next((name for name in job.needs if results[name].outcome != "done"), None)
                    if broken is not None:
                        end(job, Ended("skipped", f"{broken}: {results[broken].reason}"))
                    elif free:
                        slot = free.pop(0)
                        # Started in this thread: Linux would end the job together with the thread that started it.
                        process = start(job, slot)
                        running[pool.submit(process.wait)] = (job, slot, process, time.monotonic())
                    else:
                        continue
                    ready.remove(job)
                waiting()
                ended_now, _ = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                if stop.requested:
                    raise Stopped(stop.requested)
                for future in ended_now:
                    job, slot, process, began = running.pop(future)
                    free.append(slot)
                    seconds = time.monotonic() - began
                    code = future.result()
                    failed = Ended("failed", failure(code, job.output), seconds)
                    end(job, failed if code else Ended("done", "", seconds))
        finally:
            terminate([process for _, _, process, _ in running.values()])
    return {job.name: results[job.name] for job in jobs}


def start(job: Job, slot: Slot) -> subprocess.Popen[bytes]:
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with open(job.output, "ab") as output:
        return subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )


def die_with_parent() -> None:
    """Ask Linux for SIGTERM when the parent is killed: no orphan may write into what a restart continues."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def terminate(processes: Sequence[subprocess.Popen[bytes]], patience: float = 120.0) -> None:
    """Send SIGTERM, on which runs save themselves, and SIGKILL to those still running after ``patience`` seconds."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def failure(code: int, output: Path) -> str:
    """One line: how a command ended (exit code or signal), and the last line it wrote."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    try:
        with open(output, "rb") as file:
            file.seek(max(output.stat().st_size - 8192, 0))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    return f"{how}: {lines[-1][:300]}" if lines else how
