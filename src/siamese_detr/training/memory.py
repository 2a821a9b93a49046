"""What a process on a CPU does with the memory it frees.

Every step of a training, and every batch a detector looks at, allocates and frees the same memory. Left to itself,
glibc hands much of it back to the system each time, which clears it again, page by page, for the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt's parameters
_ALWAYS_ALLOWED = 32 << 20


def keep_memory(up_to: int = 1 << 30) -> None:
    """Let this process keep what it frees for what it allocates next. Does nothing without glibc.

    Args:
        up_to: bytes of the largest block that is kept; glibc may allow no more than 32 MB.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(_MMAP_THRESHOLD, up_to):
            mallopt(_MMAP_THRESHOLD, _ALWAYS_ALLOWED)
        mallopt(_TRIM_THRESHOLD, -1)
