"""What a process does with the memory it frees.

Every step of a training, and every batch a detector looks at, allocates and frees the same memory. Left to itself,
glibc hands much of it back to the system each time, which clears it again, page by page, for the next one.

Nothing here does anything with another C library, or where the user has told glibc in the environment what to do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch

LARGEST = 1 << 30
"""Bytes of the largest block that is kept; older releases of glibc allow no more than 32 MB."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters
_ALWAYS_ALLOWED = 32 << 20
_keeping = 0


def keep_memory() -> None:
    """Let this process keep what it frees for what it allocates next."""
    if (libc := _glibc()) is not None:
        if not libc.mallopt(_MMAP_THRESHOLD, LARGEST):
            libc.mallopt(_MMAP_THRESHOLD, _ALWAYS_ALLOWED)
        libc.mallopt(_TRIM_THRESHOLD, -1)


def hand_back_memory() -> None:
    """Hand back what is free, and large blocks when they become so: what glibc by itself comes to."""
    if (libc := _glibc()) is not None:
        libc.mallopt(_MMAP_THRESHOLD, _ALWAYS_ALLOWED)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _ALWAYS_ALLOWED)
        libc.malloc_trim(0)


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Keep it meanwhile if ``device`` is the CPU, and hand it back at the end of the outermost such context."""
    global _keeping
    if device.type != "cpu":
        yield
        return
    keep_memory()
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            hand_back_memory()


def _glibc() -> Any:
    """The C library, if it is glibc and left to us."""
    if sys.platform != "linux" or any(name in os.environ for name in SETTINGS):
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "gnu_get_libc_version") else None
