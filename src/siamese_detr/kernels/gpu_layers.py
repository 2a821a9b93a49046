"""What lies between the matrix products of a Transformer layer in training, on a GPU: few passes over memory.

PyTorch reads and writes the tokens for each of dropout, sum, layer norm and ReLU, and again for each of their
gradients, where memory sets the pace. Which values are dropped is drawn from a seed by each kernel that needs it, and
never stored; the seed comes from PyTorch's generator. Values are dropped with the probability asked for, in another
choice than PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from siamese_detr.kernels.dropout import draw_seed
from siamese_detr.kernels.gpu_linear import ROWS, TALL, WIDE, is_large, multiply, sum_rows

GROUP = 512
"""A quarter of the hidden values of a program: one draw gives four numbers."""
TOKENS = 2
"""Tokens that a program normalises at a time."""
SHARE = 256
"""Channels of a token for a warp: one alone adds them up without waiting for others."""
PROGRAMS = 2048
"""That share the tokens in the backward pass: each has sums of its own for the gradients of a norm's parameters."""
WIDEST = 1024
"""Channels of a token up to which a norm is ours: a program holds all of them."""


def relu_block(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, probability: float, dtype: torch.dtype
) -> Tensor:
    """``dropout(relu(x @ w1.T + b1)) @ w2.T + b2``, computed and given in ``dtype``.

    Args:
        x: (..., D), not empty, like the weights of ``dtype`` or in single precision.
        w1, b1: (H, D) and (H,).
        w2, b2: (D, H) and (D,).
        probability: of a hidden value to be dropped, below 1.
        dtype: theirs, or one of half precision.
    """
    return _ReluBlock.apply(x, w1, b1, w2, b2, probability, dtype)


def add_norm(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None = None, probability: float = 0.0) -> Tensor:
    """``norm(x + dropout(branch))``, or ``norm(x)``.

    Args:
        norm: a stock one, see :func:`suits`.
        x: (..., D), float32.
        branch: of the same shape, in float32 or half precision.
        probability: of a value of the branch to be dropped, below 1.
    """
    return _AddNorm.apply(x, branch, norm.weight, norm.bias, norm.eps, probability)


def suits(norm: nn.LayerNorm, x: Tensor, branch: Tensor | None = None) -> bool:
    """Whether :func:`add_norm` computes it."""
    return (
        is_large(x)
        and norm.bias is not None  # so there are weights, too
        and norm.weight.dtype == norm.bias.dtype == x.dtype == torch.float32
        and (branch is None or branch.dtype in (torch.float32, torch.float16, torch.bfloat16))
        and (branch is None or branch.shape == x.shape)
        and x.shape[-1:] == norm.weight.shape
        and x.shape[-1] <= WIDEST
    )


def _precise(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


class _ReluBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Any) -> Tensor:
        *weights, probability, dtype = parameters
        w1, b1, w2, b2 = (weight.to(dtype) for weight in weights)
        tokens = x.to(dtype).reshape(-1, x.shape[-1])
        hidden = torch.addmm(b1, tokens, w1.t())
        ctx.factor = 1 / (1 - probability)
        ctx.dtypes = x.dtype, weights[0].dtype
        with torch.cuda.device_of(hidden):
            _relu_dropout[(triton.cdiv(hidden.numel(), 4 * GROUP),)](
                hidden, hidden.numel(), draw_seed() if probability else 0, probability, ctx.factor,
                GROUP, probability > 0, _precise(hidden),
            )  # fmt: skip
        ctx.save_for_backward(tokens, w1, w2, hidden)
        return torch.addmm(b2, hidden, w2.t()).view(*x.shape[:-1], len(w2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, w1, w2, hidden = ctx.saved_tensors
        above = gradient.reshape(-1, gradient.shape[-1])
        to_hidden = above @ w2
        x_dtype, dtype = ctx.dtypes
        to_w2 = multiply(above.t(), hidden, dtype)
        rows, size = hidden.shape
        sums = hidden.new_empty(triton.cdiv(rows, ROWS), size, dtype=torch.promote_types(hidden.dtype, torch.float32))
        with torch.cuda.device_of(hidden):
            _relu_dropout_backward[(len(sums), triton.cdiv(size, WIDE))](
                to_hidden, hidden, sums, rows, size, ctx.factor, ROWS, TALL, WIDE, _precise(hidden)
            )
        to_x = multiply(to_hidden, w1, x_dtype).view(*gradient.shape[:-1], w1.shape[1])
        to_w1 = multiply(to_hidden.t(), tokens, dtype)
        return to_x, to_w1, sums.sum(0, dtype=dtype), to_w2, sum_rows(above, dtype), None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, probability: float
    ) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        total = x if branch is None else torch.empty_like(x)
        ctx.drawn = draw_seed() if probability else 0, probability, 1 / (1 - probability)
        ctx.eps, ctx.branch_dtype = eps, None if branch is None else branch.dtype
        rows = x.numel() // x.shape[-1]
        with torch.cuda.device_of(x):
            _add_norm[(triton.cdiv(rows, TOKENS),)](
                x, x if branch is None else branch.contiguous(), weight, bias, total, out, rows, x.shape[-1], eps,
                *ctx.drawn, TOKENS, _width(x), branch is not None, probability > 0, num_warps=_warps(x),
            )  # fmt: skip
        ctx.save_for_backward(total, weight)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        to_x = torch.empty_like(total)
        apart = ctx.branch_dtype is not None and (ctx.drawn[1] > 0 or ctx.branch_dtype != total.dtype)
        to_branch = torch.empty_like(total, dtype=ctx.branch_dtype) if apart else to_x
        size = total.shape[-1]
        rows = total.numel() // size
        sums = total.new_zeros(2, min(PROGRAMS, triton.cdiv(rows, TOKENS)), size)
        with torch.cuda.device_of(total):
            _add_norm_backward[(sums.shape[1],)](
                gradient, total, weight, to_x, to_branch, *sums, rows, size, ctx.eps, *ctx.drawn,
                TOKENS, _width(total), ctx.drawn[1] > 0, apart, num_warps=_warps(total),
            )  # fmt: skip
        to_weight, to_bias = sums.sum(1)
        return to_x, None if ctx.branch_dtype is None else to_branch, to_weight, to_bias, None, None


def _width(x: Tensor) -> int:
    return max(4, triton.next_power_of_2(x.shape[-1]))


def _warps(x: Tensor) -> int:
    return max(1, _width(x) // SHARE)


@triton.jit
def _relu_part(x, here, count, number, probability, factor, DROPS: tl.constexpr, PRECISE: tl.constexpr):
    value = tl.load(x + here, mask=here < count, other=0.0).to(PRECISE)
    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if DROPS:
        value *= tl.where(number < probability, 0.0, factor)  # so that what is no number stays so
    tl.store(x + here, value.to(x.dtype.element_ty), mask=here < count)


@triton.jit(do_not_specialize=["seed"])
def _relu_dropout(x, count, seed, probability, factor, GROUP: tl.constexpr, DROPS: tl.constexpr, PRECISE: tl.constexpr):
    """In place."""
    lane = tl.arange(0, GROUP)
    here = tl.program_id(0).to(tl.int64) * 4 * GROUP + lane
    a, b, c, d = tl.rand4x(seed, tl.program_id(0) * GROUP + lane)
    _relu_part(x, here, count, a, probability, factor, DROPS, PRECISE)
    _relu_part(x, here + GROUP, count, b, probability, factor, DROPS, PRECISE)
    _relu_part(x, here + 2 * GROUP, count, c, probability, factor, DROPS, PRECISE)
    _relu_part(x, here + 3 * GROUP, count, d, probability, factor, DROPS, PRECISE)


@triton.jit
def _relu_dropout_backward(
    gradient, hidden, sums, rows, size, factor,
    PART: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """In place; what is zero in ``hidden`` was negative or dropped. The sums are of ``PART`` rows each."""
    column = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((TALL, WIDE), PRECISE)
    for start in range(0, PART, TALL):
        row = tl.program_id(0) * PART + start + tl.arange(0, TALL)
        known = (row < rows)[:, None] & (column < size)[None, :]
        places = row.to(tl.int64)[:, None] * size + column[None, :]
        value = tl.load(gradient + places, mask=known, other=0.0).to(PRECISE) * factor
        value = tl.where(tl.load(hidden + places, mask=known, other=0.0) <= 0, 0.0, value)
        tl.store(gradient + places, value.to(gradient.dtype.element_ty), mask=known)
        total += value
    tl.store(sums + tl.program_id(0) * size + column, tl.sum(total, 0), mask=column < size)


@triton.jit
def _kept(seed, row, probability, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Which values of these tokens are kept."""
    group = (row * (WIDTH // 4))[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    a, b, c, d = tl.rand4x(seed, group)
    return tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (TOKENS, WIDTH)) >= probability


@triton.jit
def _normal(total, known, size, eps):
    """Tokens with a mean of 0 and a variance of 1, and by what they were multiplied for it."""
    centred = tl.where(known, total - (tl.sum(total, 1) / size)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / size + eps)[:, None]
    return centred * scale, scale


@triton.jit(do_not_specialize=["seed"])
def _add_norm(
    x, branch, weight, bias, total, out, rows, size, eps, seed, probability, factor,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr, DROPS: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, WIDTH)
    known = (row < rows)[:, None] & (column < size)[None, :]
    places = row.to(tl.int64)[:, None] * size + column[None, :]
    value = tl.load(x + places, mask=known, other=0.0)
    if ADDS:
        added = tl.load(branch + places, mask=known, other=0.0).to(tl.float32)
        if DROPS:
            added *= tl.where(_kept(seed, row, probability, TOKENS, WIDTH), factor, 0.0)
        value += added
        tl.store(total + places, value, mask=known)
    normal, _ = _normal(value, known, size, eps)
    scales = tl.load(weight + column, mask=column < size, other=0.0)[None, :]
    shifts = tl.load(bias + column, mask=column < size, other=0.0)[None, :]
    tl.store(out + places, normal * scales + shifts, mask=known)


@triton.jit(do_not_specialize=["seed"])
def _add_norm_backward(
    gradient, total, weight, to_x, to_branch, to_weight, to_bias, rows, size, eps, seed, probability, factor,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, DROPS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    scales = tl.load(weight + column, mask=column < size, other=0.0)[None, :]
    weights, biases = tl.zeros((TOKENS, WIDTH), tl.float32), tl.zeros((TOKENS, WIDTH), tl.float32)
    for part in range(tl.program_id(0), tl.cdiv(rows, TOKENS), tl.num_programs(0)):
        row = part * TOKENS + tl.arange(0, TOKENS)
        known = (row < rows)[:, None] & (column < size)[None, :]
        places = row.to(tl.int64)[:, None] * size + column[None, :]
        above = tl.load(gradient + places, mask=known, other=0.0)
        normal, scale = _normal(tl.load(total + places, mask=known, other=0.0), known, size, eps)
        weights += above * normal
        biases += above
        above *= scales
        common = (tl.sum(above, 1) / size)[:, None] + normal * (tl.sum(above * normal, 1) / size)[:, None]
        value = (above - common) * scale
        tl.store(to_x + places, value, mask=known)
        if APART:
            if DROPS:
                value *= tl.where(_kept(seed, row, probability, TOKENS, WIDTH), factor, 0.0)
            tl.store(to_branch + places, value.to(to_branch.dtype.element_ty), mask=known)
    tl.store(to_weight + tl.program_id(0) * size + column, tl.sum(weights, 0), mask=column < size)
    tl.store(to_bias + tl.program_id(0) * size + column, tl.sum(biases, 0), mask=column < size)
