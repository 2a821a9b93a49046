"""The images of a run that cannot be read: listed once each, shown at first, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from siamese_detr.errors import UserError, too_many_unreadable
from siamese_detr.messages import say
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.training.run_config import RunConfig

SHOWN = 10
"""Unreadable images that a process reports on the screen; all are in ``skipped.jsonl``."""
GONE = 32
"""Unreadable images in a row, none readable between them, that end a run: then it is the disk, not single files."""


class UnreadableImages:
    """Counts and lists them, in one process of a run.

    Args:
        config: of the run.
        epoch_size: images in an epoch.
    """

    def __init__(self, config: RunConfig, epoch_size: int) -> None:
        self.config, self.epoch_size = config, epoch_size
        self.lines = JsonLines(config.skipped)
        self._reasons: dict[str, str] = {}  # unreadable image -> reason, whichever process found it
        self._before = self._found = 0  # different images: before this session, and by this process in it
        self._readable = self._unreadable = 0  # images of the current update in this process
        self._in_a_row = 0  # unreadable images of all processes since the last readable one

    def resume(self, step: int, still_unreadable: Callable[[str], bool]) -> None:
        """On the main process: forget what was found after ``step``, and images that can be read by now."""
        records = self.lines.rewind(step, lambda record: still_unreadable(record["path"]))
        self._reasons = {record["path"]: record["reason"] for record in records}
        self._before = len(self._reasons)

    def take(self, batch: dict[str, Any], step: int, writes: bool = True) -> int:
        """Take ``skipped`` out of a micro-batch of update ``step``, and list its new images if the run ``writes``; how
        many could be read.
        """
        skipped = {str(path): str(reason) for path, reason in batch.pop("skipped", None) or ()}
        readable = count_images(batch)
        self._unreadable += len(skipped)
        self._readable += readable
        if writes and skipped.keys() - self._reasons.keys():
            # Another process may have met them in another epoch.
            self._reasons |= {record["path"]: record["reason"] for record in self.lines.read()}
            new = {path: reason for path, reason in skipped.items() if path not in self._reasons}
            self.lines.append({"step": step, "path": path, "reason": reason} for path, reason in new.items())
            self._reasons |= new
            for path in list(new)[: max(0, SHOWN - self._found)]:
                say(f"skipping an image that cannot be read: {path}: {new[path]}")
            self._found += len(new)
            if self._found - len(new) <= SHOWN < self._found:
                say(f"further ones are only listed, in {self.lines.path}")
        return readable

    def counts(self) -> list[int]:
        """Different unreadable images in all, unreadable and readable ones of the update, of this process."""
        counts = [self._before + self._found, self._unreadable, self._readable]
        self._unreadable = self._readable = 0
        return counts

    def check(self, step: int, found: float, unreadable: float, readable: float) -> None:
        """Raise :class:`UserError` after an update if too many images, or all of the last ones, cannot be read.

        Args:
            step: number of the update (1, 2, ...).
            found, unreadable, readable: :meth:`counts`, summed over all processes.
        """
        self._in_a_row = 0 if readable else self._in_a_row + int(unreadable)
        if self._in_a_row >= min(GONE, self.epoch_size):
            path, reason = next(reversed(self._reasons.items()), ("", "see the other processes"))
            raise UserError(
                f"none of the last {self._in_a_row} images can be read, up to step {step}, e.g. {path}: {reason}; is "
                f"the disk still mounted? Continue {self.config.out} with --resume"
            )
        seen = min(step * self.config.batch_size, self.epoch_size)
        if seen >= min(self.epoch_size, 1000) and found > self.config.max_bad_share * seen:
            raise too_many_unreadable(int(found), seen, self.lines.path, self.config.max_bad_share)


def count_images(batch: dict[str, Any]) -> int:
    """How many images a batch holds."""
    return max((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), default=0)
