"""Files and folders that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import json
import os
import shutil
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


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader, or what a kill or a full disk leaves, is the old or the new one.

    Raises:
        OSError: it cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=indent) + "\n")
