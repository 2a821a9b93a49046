"""Whether kernels written in Triton run on a device; how tensors get to a GPU."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether they run on ``device``. Triton comes with PyTorch, but not on Windows."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)


def send(host: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on ``device``, without waiting for what a CUDA device has yet to do. For that it is copied from
    pinned memory: from other memory, CUDA may wait although it is asked not to.
    """
    if device.type == "cuda" and not torch.compiler.is_compiling():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
