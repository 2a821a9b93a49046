"""What this machine's processors are good at."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch

CPUINFO = Path("/proc/cpuinfo")


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies matrices of single precision better than MKL does: on AMD processors with AVX-512, in a
    PyTorch that has both.
    """
    try:
        processor = CPUINFO.read_text()
    except OSError:  # not Linux
        return False
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    suits = "AuthenticAMD" in processor and "avx512f" in processor
    return built and suits and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def emulates_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Whether single precision is far faster on a device than bfloat16, in which it computes by the slowest means: an
    x86 processor with neither AVX-512 nor AVX-NE-CONVERT, an ARM processor without bf16, a GPU before Ampere.
    """
    if device == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return built and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
