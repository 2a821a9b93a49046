"""The feed-forward block of a layer, for training on a CPU: in parts that stay in its caches. (On a GPU, see
:mod:`.gpu_layers`.)

The hidden activations are a detector's largest tensors: thousands of tokens, four to eight times as wide as the tokens.
Here a few hundred tokens pass through the whole block at a time, and what the backward pass needs is kept once: the
activations after ReLU and dropout, whose zeros say where nothing passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from siamese_detr.detectors.functional import at_least_float32, observed, product_dtype
from siamese_detr.kernels.dropout import LEVELS, bits, draw_kept, dropout, scale
from siamese_detr.kernels.linear import product
from siamese_detr.runtime.gpu import runs_kernels

ROWS = 1024
"""Tokens per part: 4 MB at a width of 1024."""

ROOM = 512
"""Bytes by which the hidden activations' memory is larger than they are. Freed, it then holds four tensors of a quarter
of their size: glibc loses up to 128 bytes a tensor by aligning it, and only three would fit."""


def feed_forward(block: Any, x: Tensor) -> Tensor:
    """A stock feed-forward block of DETR's relatives, through its own sub-modules, without its last dropout.

    Args:
        block: has ``fc1``, ``activation_fn``, ``activation_dropout`` and ``fc2``.
        x: (..., D).
    """
    dropped = round(block.activation_dropout * LEVELS)
    fits = type(block.activation_fn) is nn.ReLU and dropped < LEVELS
    if block.training and fits and not torch.compiler.is_compiling():
        tensors = (x, block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias)
        dtype = product_dtype(x)
        if runs_kernels(x):
            from siamese_detr.kernels import gpu_layers, gpu_linear

            if gpu_linear.is_large(x):
                return observed(block, (x,), gpu_layers.relu_block(*tensors, block.activation_dropout, dtype))
        elif x.device.type == "cpu":
            return observed(block, (x,), relu_block(*(tensor.to(dtype) for tensor in tensors), dropped))
    return block.fc2(dropout(block.activation_fn(block.fc1(x)), block.activation_dropout, block.training))


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
        ctx.scale = scale(dropped)
        tokens, scaled = x.flatten(0, -2), w2 * ctx.scale
        out = tokens.new_empty(len(tokens), len(w2))
        size = len(tokens) * len(w1)
        hidden = tokens.new_empty(size + ROOM // tokens.element_size())[:size].view(len(tokens), len(w1))
        for rows in _parts(len(tokens)):
            # Not oneDNN's own ReLU, which makes zeros of what is no number.
            part = torch.clamp_min(product(tokens[rows], w1, b1), 0, out=hidden[rows])
            if dropped:
                bits(part).mul_(draw_kept(part.shape, dropped))
            out[rows] = product(part, scaled, b2)
        ctx.save_for_backward(x, w1, w2, hidden)
        return out.view(*x.shape[:-1], len(w2))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, hidden = ctx.saved_tensors
        tokens, above = x.flatten(0, -2), gradient.flatten(0, -2)
        to_x, to_b1 = torch.empty_like(tokens), []
        to_w1: Any = None
        to_w2: Any = None
        for rows in _parts(len(tokens)):
            part, scaled = hidden[rows], above[rows] * ctx.scale
            to_part = product(scaled, w2.t())
            torch.ops.aten.threshold_backward(to_part, part, 0, grad_input=to_part)  # nor through what was dropped
            to_w2 = _add_product(to_w2, scaled.t(), part)
            to_w1 = _add_product(to_w1, to_part.t(), tokens[rows])
            to_b1.append(to_part.sum(0))
            to_x[rows] = product(to_part, w1.t())
        return (
            to_x.view(x.shape),
            to_w1.to(x.dtype),
            torch.stack(to_b1).sum(0),
            to_w2.to(x.dtype),
            above.sum(0),
            None,
        )


def _parts(count: int) -> list[slice]:
    """At least one."""
    return [slice(start, start + ROWS) for start in range(0, max(1, count), ROWS)]


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b; of several products the sum is in at least single precision."""
    if total is None:
        return a @ b
    total = at_least_float32(total)
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)
