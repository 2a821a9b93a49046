"""Dropout for training on a CPU.

There, PyTorch draws one floating-point number per element to be dropped, which takes longer than an attention itself.
Here 16 random bits decide on an element: the probability is that asked for, rounded to a multiple of 2⁻¹⁶ (0.1 becomes
0.100006), and the kept ones are scaled by what was rounded to, so the mean is exact. One bit of each is stored for the
backward pass. Compiled, everything is PyTorch's own. (On a GPU, see :mod:`.gpu_layers`.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LEVELS = 1 << 16
MANY = 1 << 13
"""Random words from which on NumPy's SFC64, twice as fast as PyTorch's generator, is worth being started."""


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Like `nn.functional.dropout`; with other random numbers on a CPU."""
    dropped = levels(probability, x) if training else 0
    if not dropped:
        return nn.functional.dropout(x, probability, training)
    return _Dropout.apply(x, dropped, None)


def residual(x: Tensor, branch: Tensor, probability: float, training: bool) -> Tensor:
    """``x + dropout(branch)``, of one shape."""
    dropped = levels(probability, x) if training and x.dtype == branch.dtype else 0
    if not dropped:
        return x + dropout(branch, probability, training)
    return _Dropout.apply(branch, dropped, x)


def dropped_product(weights: Tensor, value: Tensor, dropped: int) -> Tensor:
    """``dropout(weights) @ value``, of one precision; for the backward pass the weights are kept once.

    Args:
        weights: (..., Q, L).
        value: (..., L, C).
        dropped: of ``LEVELS`` weights, how many are dropped.
    """
    return _DroppedProduct.apply(weights, value, dropped)


def levels(probability: float, x: Tensor) -> int:
    """The probability in units of 1 / ``LEVELS``; 0 where ``x`` is left to PyTorch, or nothing is to be drawn."""
    dropped = round(probability * LEVELS)
    ours = x.device.type == "cpu" and dropped < LEVELS and x.numel() and not torch.compiler.is_compiling()
    return dropped if ours else 0


def scale(dropped: int) -> float:
    """By which kept elements grow."""
    return LEVELS / (LEVELS - dropped)


def draw_seed() -> int:
    """For other generators, from PyTorch's."""
    return int(torch.empty((), dtype=torch.int64).random_())


def draw_kept(shape: torch.Size, dropped: int) -> Tensor:
    """Integers of 16 bits, of ``shape``: 0 with probability ``dropped / LEVELS``, else 1. All from PyTorch's generator,
    or a seed it drew.
    """
    count = -(-shape.numel() // 4)
    if count < MANY:
        words = torch.empty(count, dtype=torch.int64).random_(-(2**63), None)
    else:
        words = torch.from_numpy(np.random.SFC64(draw_seed()).random_raw(count).view(np.int64))
    # Compared in place: nine times as fast.
    return words.view(torch.int16)[: shape.numel()].ge_(dropped - LEVELS // 2).view(shape)


def bits(x: Tensor) -> Tensor:
    """``x`` as what is multiplied by zeros and ones: half-precision numbers as integers, three times as fast."""
    return x.view(torch.int16) if x.element_size() == 2 else x


def mask(x: Tensor, kept: Tensor) -> Tensor:
    """``x`` where ``kept``, of any integers, is 1, and 0 where it is 0."""
    # Converted into the result: PyTorch would convert them, too, into a tensor of its own.
    return kept.to(bits(x).dtype, copy=True).mul_(bits(x)).view(x.dtype)


def pack(kept: Tensor) -> Tensor:
    """Zeros and ones, of any integers, as bits."""
    return torch.from_numpy(np.packbits(kept.to(torch.uint8).numpy()))


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """What :func:`pack` was given, of ``shape``, as uint8."""
    return torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel())).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, added: Tensor | None) -> Tensor:
        kept = draw_kept(x.shape, dropped)
        ctx.save_for_backward(pack(kept))
        ctx.factor = scale(dropped)
        if added is not None:
            factors = kept.to(x.dtype)
            return torch.addcmul(added, factors, x, value=ctx.factor, out=factors)
        return mask(x, kept).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        to_x = mask(gradient, unpack(packed, gradient.shape)).mul_(ctx.factor)
        return to_x, None, gradient if ctx.needs_input_grad[2] else None


class _DroppedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, value: Tensor, dropped: int) -> Tensor:
        kept = draw_kept(weights.shape, dropped)
        ctx.save_for_backward(weights, value, pack(kept))
        ctx.factor = scale(dropped)
        return mask(weights, kept) @ (value * ctx.factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, value, packed = ctx.saved_tensors
        above, kept = gradient * ctx.factor, unpack(packed, weights.shape)
        to_value = mask(weights, kept).transpose(-1, -2) @ above
        return mask(above @ value.transpose(-1, -2), kept), to_value, None
