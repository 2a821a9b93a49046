"""What verbs say on the way: the logger ``siamese_detr``, which writes to standard error.

Programs that want the messages elsewhere replace the logger's handler; ``quiet=True`` of every verb leaves them out.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track as rich_track
from rich.table import Table

Item = TypeVar("Item")
LOGGER = logging.getLogger("siamese_detr")


class StandardError(logging.Handler):
    """Writes to what is ``sys.stderr`` at the time: progress bars and notebooks exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


if not LOGGER.handlers:
    LOGGER.addHandler(StandardError())
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def say(text: str, here: bool = True) -> None:
    """Tell the user something.

    Args:
        text: what.
        here: whether this process says it, which of several is the main one.
    """
    if here:
        LOGGER.info("%s", text)


def audible() -> bool:
    """Whether messages are wanted."""
    return LOGGER.isEnabledFor(logging.INFO)


@contextlib.contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Context without messages, tables and progress bars."""
    level = LOGGER.level
    try:
        if quiet:
            LOGGER.setLevel(logging.WARNING)
        yield
    finally:
        LOGGER.setLevel(level)


def track(items: Iterable[Item], title: str, total: int) -> Iterable[Item]:
    """The items, with a progress bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    hidden = not (console.is_terminal and audible())
    return rich_track(items, title, total, console=console, transient=True, disable=hidden)


def output() -> Console:
    """Standard output, for the tables that a verb ends with."""
    return Console(quiet=not audible())


def as_html(table: Table) -> str:
    """A table for notebooks, as HTML."""
    console = Console(record=True, file=io.StringIO(), width=120)
    console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
