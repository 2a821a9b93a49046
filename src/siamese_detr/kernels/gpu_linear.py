"""Linear layers trained in half precision on a GPU, with few launches and passes over memory.

Gradients leave the products in the parameters' precision, where PyTorch rounds them to half precision and converts
them back; the bias's, a sum over all tokens, is computed by many programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGE = 1 << 23
"""Values of the tokens from which on fewer passes over memory save more than the detour through Python costs. With
fewer, a GPU waits for its host anyway."""
TALL, WIDE = 16, 128
"""Rows and columns that are added up at a time."""
ROWS = 256
"""That a program goes through; what the programs find is summed once more."""
MANY = 1 << 21
"""Values from which on that is worth a second launch."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x @ weight.T + bias``, computed and given in half precision.

    Args:
        x: (..., D), float32 or of ``dtype``.
        weight: (H, D), float32.
        bias: (H,), float32.
        dtype: float16 or bfloat16.
    """
    return _Linear.apply(x, weight, bias, dtype)


def suits(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether :func:`linear` computes it."""
    return (
        is_large(x)
        and dtype in (torch.float16, torch.bfloat16)
        and x.dtype in (torch.float32, dtype)
        and weight.dtype == torch.float32
        and (bias is None or bias.dtype == torch.float32)
    )


def is_large(x: Tensor) -> bool:
    """Whether these tokens, of a batch that is not empty, are worth kernels of our own."""
    return x.numel() >= max(1, LARGE)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` of matrices, given in ``dtype``."""
    half = a.dtype in (torch.float16, torch.bfloat16)
    if half and dtype == torch.float32 and a.is_cuda and torch.version.hip is None:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, H) -> (H,), in ``dtype``."""
    rows, size = x.shape
    if x.numel() < MANY or x.dtype == torch.float64 or not x.is_contiguous():
        return x.sum(0, dtype=dtype)
    sums = x.new_empty(triton.cdiv(rows, ROWS), size, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _sum_rows[(len(sums), triton.cdiv(size, WIDE))](x, sums, rows, size, ROWS, TALL, WIDE)
    return sums.sum(0, dtype=dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        tokens, cast = x.to(dtype).reshape(-1, x.shape[-1]), weight.to(dtype)
        ctx.save_for_backward(tokens, cast)
        ctx.x_dtype = x.dtype
        out = tokens @ cast.t() if bias is None else torch.addmm(bias.to(dtype), tokens, cast.t())
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight = ctx.saved_tensors
        above = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_weight, to_bias = ctx.needs_input_grad[:3]
        return (
            multiply(above, weight, ctx.x_dtype).view(*gradient.shape[:-1], weight.shape[1]) if to_x else None,
            multiply(above.t(), tokens, torch.float32) if to_weight else None,
            sum_rows(above, torch.float32) if to_bias else None,
            None,
        )


@triton.jit
def _sum_rows(x, sums, rows, size, PART: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((TALL, WIDE), tl.float32)
    for start in range(0, PART, TALL):
        row = tl.program_id(0) * PART + start + tl.arange(0, TALL)
        known = (row < rows)[:, None] & (column < size)[None, :]
        total += tl.load(x + row.to(tl.int64)[:, None] * size + column[None, :], mask=known, other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0) * size + column, tl.sum(total, 0), mask=column < size)
