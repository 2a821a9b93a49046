"""The process's memory, between the steps of a training on a CPU.

Every step allocates and frees the same gigabytes. Left to itself, glibc hands much of it back to the system each time,
and the system has to clear it again, page by page, for the next step.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 32 << 20
"""Bytes from which a block is a mapping of its own, which is always handed back: the most that glibc allows."""


def keep_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 32 MB, for what it allocates next. glibc only."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _LARGEST)
        mallopt(_TRIM_THRESHOLD, -1)
