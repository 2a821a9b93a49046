"""The feed-forward block of a layer, for training on a CPU: in parts that stay in its caches.

The hidden activations are a detector's largest tensors: thousands of tokens, four to eight times as wide as the tokens.
Here a few hundred tokens pass through the whole block at a time, and what the backward pass needs is kept once: the
activations after ReLU and dropout, whose zeros say where nothing passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .attention import LEVELS, draw_kept, dropout, residual
from .linear import product

ROWS = 1024
"""Tokens per part: 4 MB at a width of 1024."""


def add_feed_forward(block: Any, x: Tensor) -> Tensor:
    """``x + block(x)`` for a stock feed-forward block of DETR's relatives, through its own sub-modules.

    Args:
        block: has ``fc1``, ``activation_fn``, ``activation_dropout``, ``fc2`` and ``dropout``.
        x: (..., D).
    """
    dropped = round(block.activation_dropout * LEVELS)
    fits = type(block.activation_fn) is nn.ReLU and dropped < LEVELS
    if block.training and fits and x.device.type == "cpu":
        # Autocast does not see inside.
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        tensors = (x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
        projected = relu_block(*(tensor.to(dtype) for tensor in tensors), dropped)
    else:
        hidden = block.activation_fn(block.fc1(x))
        projected = block.fc2(dropout(hidden, block.activation_dropout, block.training))
    return residual(x, projected, block.dropout, block.training)


@torch.compiler.disable
def relu_block(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dropped: int) -> Tensor:
    """``dropout(relu(x @ w1.T + b1)) @ w2.T + b2``, all tensors of one precision.

    Args:
        x: (..., D).
        w1, b1: (H, D) and (H,).
        w2, b2: (D, H) and (D,).
        dropped: of ``LEVELS`` hidden values, how many are dropped; 0: none.
    """
    return _ReluBlock.apply(x, w1, b1, w2, b2, dropped)


class _ReluBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, dropped: int) -> Tensor:
        ctx.scale = LEVELS / (LEVELS - dropped)
        tokens, scaled = x.flatten(0, -2), w2 * ctx.scale
        out = tokens.new_empty(len(tokens), len(w2))
        hidden = []
        for rows in _parts(len(tokens)):
            part = product(tokens[rows], w1, b1).relu_()  # oneDNN's own ReLU makes zeros of what is no number
            if dropped:
                part.mul_(draw_kept(part.shape, dropped))
            out[rows] = product(part, scaled, b2)
            hidden.append(part)
        ctx.save_for_backward(x, w1, w2, *hidden)
        return out.view(*x.shape[:-1], len(w2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, *hidden = ctx.saved_tensors
        tokens, above = x.flatten(0, -2), gradient.flatten(0, -2)
        scaled, to_x = w2 * ctx.scale, torch.empty_like(tokens)
        exact = torch.promote_types(x.dtype, torch.float32)  # in which parts are summed
        to_w1, to_w2 = (torch.zeros_like(weight, dtype=exact) for weight in (w1, w2))
        to_b1 = to_w1.new_zeros(len(w1))
        for rows, part in zip(_parts(len(tokens)), hidden, strict=True):
            to_part = product(above[rows], scaled.t())
            torch.ops.aten.threshold_backward(to_part, part, 0, grad_input=to_part)  # nor through what was dropped
            _add_product(to_w2, above[rows].t(), part)
            _add_product(to_w1, to_part.t(), tokens[rows])
            to_b1 += to_part.sum(0)
            to_x[rows] = product(to_part, w1.t())
        weights = (part.to(x.dtype) for part in (to_w1, to_b1, to_w2.mul_(ctx.scale)))
        return to_x.view(x.shape), *weights, above.sum(0), None


def _parts(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in the precision of ``total``."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
