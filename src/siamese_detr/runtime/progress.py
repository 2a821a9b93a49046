"""The progress bar of a run."""

from __future__ import annotations

from typing import Any

import transformers
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar(transformers.TrainerCallback):
    """A bar on standard error with the last logged loss; reading it costs no sync of its own.

    Args:
        title: what is being done.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.progress: Progress | None = None
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        from rich.console import Console

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        columns += (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())  # type: ignore[assignment]
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, loss="")
        self.progress.start()

    def on_step_end(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.progress is not None and self.task is not None and logs and "loss" in logs:
            self.progress.update(self.task, loss=f"loss {logs['loss']:.4g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was; also after an error, which ends training without ``on_train_end``."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
