"""Whether this project's own kernels, written in Triton, can run; how tensors get to a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


def runs_kernels(x: Tensor) -> bool:
    """Whether they can on the device of ``x``; if not, there is always another way."""
    return x.is_cuda and _supported(x.device.index or 0)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on ``device``, without waiting for what a CUDA device has yet to do. For that it is copied from
    pinned memory: from other memory, CUDA may wait although it is asked not to.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


@torch.compiler.assume_constant_result
@functools.cache
def _supported(index: int) -> bool:
    # Triton comes with PyTorch, but not on Windows.
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(index) >= (7, 0)
