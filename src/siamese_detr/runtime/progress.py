"""How far a run is: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from siamese_detr.messages import audible, say

SECONDS_BETWEEN_LINES = 60
FIRST_LINE = 10
"""Steps after which the first line says how long the run will take."""


class ProgressBar(Progress):
    """On standard error: a bar with the last logged loss and the time left, or, where that is no terminal, a line once
    a minute. A context.

    Args:
        title: what is being done.
        total: steps in all.
        done: steps done already.
        unit: what is counted, if it is not steps.
    """

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "step") -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        super().__init__(*columns, *times, console=console, disable=not (console.is_terminal and audible()))
        self.run = self.add_task(title, total=total, completed=done, loss="")
        self._title, self._total, self._first, self._unit = title, total, done, unit
        self._began = self._last = time.monotonic()
        self._line = done  # the last for which there was a line

    def step(self, done: int, loss: float | None = None) -> None:
        """Show that so many steps are done, and the loss."""
        fields = {} if loss is None else {"loss": f"loss {loss:.4g}"}
        self.update(self.run, completed=done, **fields)  # type: ignore[arg-type]
        now, new = time.monotonic(), done - self._first
        first = done > self._line and new == FIRST_LINE
        if self.disable and (first or now - self._last >= SECONDS_BETWEEN_LINES):
            self._last, self._line = now, done
            loss_text = self.tasks[0].fields["loss"]
            shown = f"{self._unit} {done} of {self._total}{', ' * bool(loss_text)}{loss_text}"
            self.say(f"{self._title}: {shown}, {self.left(done)} left")

    def left(self, done: int) -> str:
        """The time that the rest takes if so many steps are done, for people."""
        return duration((time.monotonic() - self._began) / max(done - self._first, 1) * (self._total - done))

    def say(self, text: str) -> None:
        """Write a line, above the bar if there is one."""
        say(text)


def duration(seconds: float) -> str:
    """For people: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
