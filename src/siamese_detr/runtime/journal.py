"""What a run writes down while it goes: means of the loss terms, ``log.jsonl``, TensorBoard, the images it skipped."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from siamese_detr.files import written_aside


class WindowMeans:
    """Means of scalars over the steps since the last log, summed on the device: reading them is the only sync.

    The sums are part of a checkpoint, so that the first log after a resume is that of the uninterrupted run.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names of the terms added together -> vector of their sums
        self.count = 0

    def add(self, terms: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add scalars of one micro-batch, each counting ``weight`` (the micro-batch's share of its step)."""
        names = tuple(terms)
        values = torch.stack([value.detach() for value in terms.values()])
        values = values.to(precise(values.device)) * weight
        self.sums[names] = self.sums[names] + values if names in self.sums else values

    def groups(self, local: bool = False) -> dict[tuple[str, ...], list[float]]:
        """The sums as numbers, averaged over the processes (a collective) unless ``local``."""
        if not self.sums:
            return {}
        names = sorted(self.sums)
        values = torch.cat([self.sums[group] for group in names])
        if not local and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(values)
            values /= torch.distributed.get_world_size()
        numbers = iter(values.tolist())
        return {group: [next(numbers) for _ in group] for group in names}

    def read(self, local: bool = False) -> dict[str, float]:
        """The sum of each term; see :meth:`groups`."""
        total: dict[str, float] = {}
        for names, values in self.groups(local).items():
            for name, value in zip(names, values, strict=True):
                total[name] = total.get(name, 0.0) + value
        return total

    def drain(self) -> dict[str, float]:
        """Means over the window, which then starts again."""
        means = {name: value / max(self.count, 1) for name, value in self.read().items()}
        self.sums, self.count = {}, 0
        return means

    def state(self, local: bool = False) -> dict[str, Any]:
        """What :meth:`restore` takes, of JSON types; grouped, so that what is added later rounds as it would."""
        return {"sums": [[names, values] for names, values in self.groups(local).items()], "count": self.count}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        if not isinstance(state["sums"], list):
            raise TypeError("the sums are no list")
        self.sums = {
            tuple(names): torch.tensor(values, dtype=precise(device), device=device) for names, values in state["sums"]
        }
        self.count = state["count"]


def precise(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class JsonLines:
    """A file of JSON objects, one a line, each with the ``step`` it belongs to; full float precision.

    A line that a kill cut short costs that record alone: it is left out when read, and ended before another is added.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(dict(record)) + "\n" for record in records)
        if not text:
            return
        with open(self.path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                text = "\n" * (file.read(1) != b"\n") + text
            # One write per call: lines of processes that share the file do not mix. A disk that is nearly full takes
            # a part; the rest then raises.
            left = memoryview(text.encode())
            while left:
                left = left[file.write(left) or 0 :]

    def read(self) -> list[dict[str, Any]]:
        """The records; a line cut short by a kill is left out."""
        records = []
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                records.append(record)
        return records

    def rewind(self, step: int, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> list[dict[str, Any]]:
        """Drop the records after ``step`` (a resumed run writes them again), and those not to ``keep``; the others."""
        kept = [record for record in self.read() if record.get("step", step + 1) <= step and keep(record)]
        if self.path.exists():
            with written_aside(self.path, durable=True) as aside:
                aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        return kept


class Journal:
    """The logs of a run directory: ``log.jsonl`` and ``tensorboard/``. Only the main process has one."""

    def __init__(self, directory: Path, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.lines = JsonLines(directory / "log.jsonl")
        self.lines.rewind(step)
        # Before there is a board: its thread may die while it is made, and be heard after that has raised.
        self._excepthook, threading.excepthook = threading.excepthook, self._hear
        # purge_step hides what was logged after the checkpoint that the run continues from.
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if step else None)

    def track(self, step: int, values: Mapping[str, float]) -> None:
        """Show values of a step in TensorBoard."""
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def show(self, name: str, picture: Image.Image, step: int) -> Path:
        """Write a picture into the run directory and show it in TensorBoard; where it is."""
        path = self.lines.path.with_name(f"{name}.jpg")
        with written_aside(path) as aside:
            picture.save(aside, "JPEG", quality=90)
        self.board.add_image(f"train/{name}", np.asarray(picture), step, dataformats="HWC")
        return path

    def close(self) -> None:
        """Write what is left.

        Raises:
            OSError: TensorBoard's thread could not write, now or before.
        """
        try:
            self.board.close()
        finally:
            threading.excepthook = self._excepthook

    def _hear(self, failed: threading.ExceptHookArgs) -> None:
        """Not of the death of TensorBoard's thread: what it died of is raised by the next call of the board."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._excepthook(failed)
