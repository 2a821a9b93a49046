"""What the processors of this machine are good at."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies matrices of single precision better than MKL does: on AMD processors, in a PyTorch that
    has both.
    """
    try:
        processor = CPUINFO.read_text()
    except OSError:  # not Linux
        return False
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return built and "AuthenticAMD" in processor and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def emulates_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Whether a device is known to have no instructions for bfloat16; in single precision it is far faster then."""
    if device == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return built and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
