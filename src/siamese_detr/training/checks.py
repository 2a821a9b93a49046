"""What is refused before a run begins, and what it will take."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import send_to_device

from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.errors import UserError
from siamese_detr.messages import say
from siamese_detr.randomness import seed_torch
from siamese_detr.runtime.hardware import emulates_bf16
from siamese_detr.runtime.progress import duration
from siamese_detr.training.task import Callback

if TYPE_CHECKING:
    from siamese_detr.training.loop import Loop

ADAMW_BYTES = 8
"""Of AdamW's two averages, for each parameter."""
TRIAL_SECONDS = 20.0
"""A trial step on a whole micro-batch, which tells time better than two images do, is made if it takes no longer."""
FORWARD_SHARE = 1 / 3
"""Of a training step's time, that an evaluation takes for as many images: a backward pass costs about two forward."""


def check_precision(precision: str, device: torch.device, main: bool) -> None:
    """Refuse a precision that cannot be trained in, and warn of one that is slow here.

    Args:
        precision: as in :class:`~siamese_detr.training.run_config.RunConfig`.
        device: where the run computes.
        main: whether this is the process that warns.

    Raises:
        UserError: fp16 without an accelerator.
    """
    cpu = device.type == "cpu"
    if cpu and precision == "fp16":
        raise UserError("precision fp16 needs an accelerator: use bf16 or fp32 here")
    if main and precision == "bf16" and emulates_bf16("cpu" if cpu else "cuda"):
        other = "fp32" if cpu else "fp16"
        warnings.warn(f"this processor only emulates bf16, which is slow: use precision {other}", stacklevel=2)


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise :class:`UserError` for experiment trackers that Accelerate does not know, or that are not installed."""
    there = [str(name) for name in get_available_trackers()]
    if unknown := [name for name in report_to if name not in (*there, "all", "none")]:
        raise UserError(
            f"report_to: there is no tracker {unknown[0]!r}, or its package is not installed; "
            f"there are: {', '.join(there) or 'none'}"
        )


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise :class:`UserError` for what is no :class:`~siamese_detr.training.task.Callback`."""
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise UserError(
                f"callbacks: {callback!r} is no Callback: derive its class from siamese_detr.training.task.Callback"
            )


def check_batch_size(batch_size: int, accumulate: int, processes: int) -> None:
    """Raise :class:`UserError` if the images of an update cannot be dealt out evenly."""
    if batch_size % (processes * accumulate):
        raise UserError(
            f"batch_size {batch_size} must be a multiple of processes x accumulate ({processes} x {accumulate})"
        )


@dataclass(frozen=True)
class Estimate:
    """What a run takes, from trial steps on one, two and, if they are quick, a whole micro-batch of its largest images.

    Args:
        fixed: bytes of memory in use whatever the batch: weights, their gradients, the optimiser's averages.
        per_image: further bytes for each image of a micro-batch.
        free: bytes there are for all of that.
        seconds: of the whole run, without loading images.
    """

    fixed: float
    per_image: float
    free: float
    seconds: float

    def memory(self, images: int) -> float:
        """Bytes, for micro-batches of so many images in this process."""
        return self.fixed + images * self.per_image

    def text(self, batch_size: int, accumulate: int) -> str:
        """For people: memory and time, and where that does not fit, what would.

        Args:
            batch_size: images of this process in an update.
            accumulate: micro-batches they are cut into.
        """
        needed, there = (f"{value / 1e9:.1f} GB" for value in (self.memory(batch_size // accumulate), self.free))
        if self.memory(batch_size // accumulate) <= self.free:
            return f"this run takes about {duration(self.seconds)} and up to {needed} of memory; {there} are free"
        parts = [n for n in range(accumulate, batch_size + 1) if batch_size % n == 0]
        fits = next((n for n in parts if self.memory(batch_size // n) <= self.free), None)
        remedy = f"use accumulate {fits}" if fits is not None else f"use accumulate {batch_size} and smaller images"
        return f"warning: this run needs up to {needed} of memory, but {there} are free: it may be killed; {remedy}"


def estimate(loop: Loop) -> Estimate | None:
    """Try steps on a run's largest images; no update is made, and no random number of the run is changed. A collective.

    Returns:
        None where peak memory cannot be read (not Linux, not CUDA), or a trial step failed.
    """
    task, team, config = loop.task, loop.team, loop.config
    if config.compile:  # for other sizes takes minutes
        return None
    images = config.batch_size // (config.accumulate * team.size)  # of this process in a micro-batch
    buffers = [(buffer, buffer.clone()) for buffer in task.model.buffers()]
    free = free_memory(team.device)
    task.model.train()
    peaks: dict[int, float] = {}
    seconds = 0.0
    try:
        for number in sorted({0, 1, min(2, images), images}):
            expected = peaks[max(peaks)] + (number - max(peaks)) * slope(peaks) if peaks else 0.0
            # More would be killed, or keep the user waiting: fewer must do.
            too_slow = number > 2 and number * seconds > TRIAL_SECONDS
            if number > 1 and team.any(expected > free or too_slow):
                break
            tried = try_step(loop, number)
            if team.any(tried is None) or tried is None:
                return None
            peaks[number], seconds = tried
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    learned = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    per_image = slope(peaks)
    fixed = peaks[1] - per_image + ADAMW_BYTES * learned
    trained = loop.steps * config.batch_size + FORWARD_SHARE * task.evaluated
    return Estimate(fixed, per_image, free, trained * seconds / team.size)


def try_step(loop: Loop, images: int) -> tuple[float, float] | None:
    """Peak memory in bytes, and seconds per image, of a step on so many images (0: of doing nothing), in this process
    alone; None if that failed."""
    task, device = loop.task, loop.team.device
    try:
        batch = task.largest(images) if images else None
        reset_peak(device)
        began = time.monotonic()
        if batch is not None:
            seed_torch(loop.config.seed, 0, 0, loop.team.rank)
            loss, _ = task.step(task.model, send_to_device(batch, device))
            loop.accelerator.backward(loss)
            loss.item()  # wait for the device
        elif images:
            return None
        return peak_memory(device), (time.monotonic() - began) / max(images, 1)
    # The first update says what is wrong, batch norms of one cell want more than one image, or there is no /proc.
    except (NonFiniteError, ValueError, OSError):
        return None
    finally:
        loop.optimizer.zero_grad()


def slope(peaks: Mapping[int, float]) -> float:
    """Bytes that each further image takes, from the peaks (number of images -> bytes; 0: before) seen so far."""
    known = sorted(peaks)
    first, last = known[min(1, len(known) - 2)] if len(known) > 1 else 0, known[-1]
    return max((peaks[last] - peaks[first]) / (last - first), 0.0) if last > first else 0.0


def report_needs(loop: Loop) -> None:
    """Say, before the first update, what the run takes. A collective."""
    if loop.state.step > 0:
        return
    takes = estimate(loop)
    if takes is not None and loop.team.main:
        say(takes.text(loop.config.batch_size // loop.team.size, loop.config.accumulate))


def free_memory(device: torch.device) -> float:
    """Bytes that this process may have on a device, those it has included."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = [float(psutil.virtual_memory().available), *map(float, control_group_free())]
    return min(free) / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) + psutil.Process().memory_info().rss


def control_group_free(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left under each memory limit that containers and job schedulers set on this process."""
    free = []
    try:
        own = process.read_text().strip().rpartition("::")[2].lstrip("/")
        for folder in (root / own, *(root / own).parents):
            limit, used = folder / "memory.max", folder / "memory.current"
            if folder.is_relative_to(root) and limit.exists() and (text := limit.read_text().strip()) != "max":
                lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                free.append(int(text) - int(used.read_text()) + int(lines.get("inactive_file", 0)))
    except (OSError, ValueError):  # another kind of system
        pass
    return free


def reset_peak(device: torch.device) -> None:
    """Let :func:`peak_memory` begin from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Bytes that this process had on the device at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024.0 * int(line.split()[1])
