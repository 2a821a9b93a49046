"""What this machine's processors are good at."""

from __future__ import annotations

from typing import Literal

import torch


def emulates_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Whether single precision is far faster on a device than bfloat16, in which it computes by the slowest means: an
    x86 processor with neither AVX-512 nor AVX-NE-CONVERT, an ARM processor without bf16, a GPU before Ampere.
    """
    if device == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return built and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
