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
    """Call ``work`` with every part, on several threads.

    Args:
        work: gives the interpreter's lock back while it computes. It must not call PyTorch.
        parts: a thread that is done with one takes the next one.
        count: threads; by default as many as PyTorch is to use.

    Raises:
        whatever ``work`` raises first.
    """
    count, left, errors = count or torch.get_num_threads(), iter(list(parts)), []

    def take(_: Any) -> None:
        try:
            for part in left:
                work(part)
        except BaseException as error:  # OpenMP could not hand it on
            errors.append(error)

    parallel = _openmp()
    if count == 1:
        take(None)
    elif parallel is not None:
        parallel(_CALLBACK(take), None, count, 0)
    else:
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(take, range(count)))
    if errors:
        raise errors[0]


@functools.cache
def _openmp() -> Any:
    """What begins a parallel region of GNU OpenMP, also in LLVM's and Intel's runtimes; None if PyTorch loaded none."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes, parallel.restype = (_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return parallel
