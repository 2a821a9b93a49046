"""The progress bar of a run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar(Progress):
    """A bar on standard error with the last logged loss; a context.

    Args:
        title: what is being done.
        total: updates in all.
        done: updates done already.
    """

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
        super().__init__(*columns, *times, console=Console(stderr=True))
        self.run = self.add_task(title, total=total, completed=done, loss="")

    def step(self, done: int, loss: float | None = None) -> None:
        """Show that so many updates are done, and the loss."""
        fields = {} if loss is None else {"loss": f"loss {loss:.4g}"}
        self.update(self.run, completed=done, **fields)  # type: ignore[arg-type]
