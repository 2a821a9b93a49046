"""Work of our own on the threads that PyTorch computes with.

After its work PyTorch's threads keep their cores busy for milliseconds, in wait for more of it. Other threads would
have to share the cores with them meanwhile, and take longer than one alone for work of as much time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

Part = TypeVar("Part")

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def on_all_threads(work: Callable[[Part], object], parts: Iterable[Part], count: int | None = None) -> None:
    """Call ``work`` with every part, on several threads: this one and others. Like PyTorch's own operations, not in a
    process forked from one that has computed with several threads.

    Args:
        work: gives the interpreter's lock back while it computes. It must not call PyTorch.
        parts: a thread that is done with one takes the next one.
        count: threads; by default as many as PyTorch is to use.

    Raises:
        what ``work``, or a signal's handler meanwhile, raises. The other parts are done all the same.
    """
    count, left, errors = count or torch.get_num_threads(), iter(list(parts)), []

    def share() -> None:
        for part in left:
            work(part)

    def take(_: Any) -> None:
        try:
            share()
        except BaseException as error:  # OpenMP could not hand it on
            errors.append(error)

    region = _openmp()
    if count == 1:
        share()
    elif region is not None:
        (start, end), callback = region, _CALLBACK(take)
        # This thread's share is no callback: what handlers of signals raise at the beginning of one is lost.
        try:
            start(callback, None, count)
            share()
        finally:
            end()
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(take, range(count)))
    if errors:
        raise errors.pop()


@functools.cache
def _openmp() -> tuple[Any, Any] | None:
    """What begins a parallel region of OpenMP, all threads but this one calling a function, and what waits for its end;
    None if PyTorch loaded no OpenMP that has these (GNU's has, and so have LLVM's and Intel's)."""
    try:
        library = ctypes.CDLL(None)
        start, end = library.GOMP_parallel_start, library.GOMP_parallel_end
    except (AttributeError, OSError, TypeError):
        return None
    start.argtypes, start.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint), None
    end.argtypes, end.restype = (), None
    return start, end
