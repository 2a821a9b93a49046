"""Files and folders that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"
"""What the names of things half written begin with."""
DISCARDED = ".removing-"
"""What the names of things half removed begin with."""


def clean(folder: Path) -> None:
    """Remove what killed processes left half-written or half-removed in ``folder``."""
    for prefix in (TEMPORARY, DISCARDED):
        for path in folder.glob(f"{prefix}*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder; renamed first, so that a kill meanwhile leaves no half of it under its name."""
    doomed = folder.with_name(f"{DISCARDED}{folder.name}-{os.getpid()}")
    with contextlib.suppress(OSError):
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def written_aside(path: Path, durable: bool = False) -> Iterator[Path]:
    """Context that yields where to write a file, of the same suffix, and at its end renames that to ``path``: what a
    reader finds, or a kill or a full disk leaves, is the old or the new one.

    Args:
        path: the file.
        durable: also after a power cut, for which its content is forced to the disk before it is renamed.

    Raises:
        OSError: it cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        yield temporary
        if durable:
            flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8, by :func:`written_aside`."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")
