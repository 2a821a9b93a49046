"""What a process does with the memory it frees.

Every step of a training, and every batch a detector looks at, allocates and frees the same memory. Left to itself,
glibc hands much of it back to the system each time, which clears it again, page by page, for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters
_ALWAYS_ALLOWED = 32 << 20
_keeping = 0


def keep_memory(up_to: int = 1 << 30) -> None:
    """Let this process keep what it frees for what it allocates next. Does nothing without glibc.

    Args:
        up_to: bytes of the largest block that is kept; glibc may allow no more than 32 MB.
    """
    if (libc := _glibc()) is not None:
        if not libc.mallopt(_MMAP_THRESHOLD, up_to):
            libc.mallopt(_MMAP_THRESHOLD, _ALWAYS_ALLOWED)
        libc.mallopt(_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep it meanwhile; at the end of the outermost such context all is handed back that can be."""
    global _keeping
    keep_memory()
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping and (libc := _glibc()) is not None:
            # What glibc comes to by itself in a process that frees large blocks.
            libc.mallopt(_MMAP_THRESHOLD, _ALWAYS_ALLOWED)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _ALWAYS_ALLOWED)
            libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
