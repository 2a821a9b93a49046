"""What this machine's processors are good at."""

from __future__ import annotations

from typing import Literal

import torch

from siamese_detr.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device of that name; ``auto``: this process's accelerator if there is one, else the CPU.

    Raises:
        UserError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = str(accelerator or "cpu")
        if name == "cuda" and torch.distributed.is_available() and torch.distributed.is_initialized():
            name = f"cuda:{torch.cuda.current_device()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try 'auto' or 'cpu'"
        ) from error
    return device


def emulates_bf16(device: Literal["cpu", "cuda"]) -> bool:
    """Whether single precision is far faster on a device than bfloat16, in which it computes by the slowest means: an
    x86 processor with neither AVX-512 nor AVX-NE-CONVERT, an ARM processor without bf16, a GPU before Ampere.
    """
    if device == "cuda":
        return torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    built = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    return built and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
