"""Attention and dropout for training on a CPU.

There, PyTorch draws one floating-point number per element to be dropped, which takes longer than the attention itself.
Here 16 random bits decide on an element: the probability is that asked for, rounded to a multiple of 2⁻¹⁶ (0.1 becomes
0.100006), and the kept ones are scaled by what was rounded to, so the mean is exact. The mask takes a quarter of the
memory. Without dropout, and on other devices, everything is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "siamese_detr"
"""Under which Transformers knows :func:`attention`. It is never saved: a configuration file says nothing of it."""
LEVELS = 1 << 16


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Like `nn.functional.dropout`; with other random numbers on a CPU."""
    dropped = round(probability * LEVELS)
    if not training or x.device.type != "cpu" or not 0 < dropped < LEVELS or not x.numel():
        return nn.functional.dropout(x, probability, training)
    return _Dropout.apply(x, dropped, None)


def residual(x: Tensor, branch: Tensor, probability: float, training: bool) -> Tensor:
    """``x + dropout(branch)``, of one shape."""
    dropped = round(probability * LEVELS)
    if not training or x.device.type != "cpu" or not 0 < dropped < LEVELS or x.dtype != branch.dtype:
        return x + dropout(branch, probability, training)
    return _Dropout.apply(branch, dropped, x)


def draw_kept(shape: torch.Size, dropped: int) -> Tensor:
    """Bytes, of ``shape``: 0 with probability ``dropped / LEVELS``, else 1.

    PyTorch multiplies by bytes three times as fast as by booleans.
    """
    words = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return (words.view(torch.int16)[: shape.numel()] >= dropped - LEVELS // 2).view(torch.uint8).view(shape)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int, added: Tensor | None) -> Tensor:
        kept = draw_kept(x.shape, dropped)
        ctx.save_for_backward(kept)
        ctx.scale = LEVELS / (LEVELS - dropped)
        out = (x * kept).mul_(ctx.scale)
        return out if added is None else out.add_(added)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None, gradient if ctx.needs_input_grad[2] else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function: (B, heads, Q, C) and (B, heads, L, C) -> (B, Q, heads, C).

    Args:
        module: unused but for PyTorch's own attention.
        query, key, value: the projections; `value` may have another C.
        attention_mask: boolean, True = may attend, or additive; broadcastable to (B, heads, Q, L).
        dropout: probability, 0 when not training.
        scaling: of the scores.
    """
    if not dropout or query.device.type != "cpu":
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = _dropout(scores.softmax(-1).to(value.dtype), dropout, True)
    return (weights @ value).transpose(1, 2).contiguous(), None


_dropout = dropout
"""The function, where an argument has its name."""

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Let a model that uses PyTorch's attention use ours."""
    if model.config._attn_implementation == "sdpa":
        model.config._attn_implementation = {"": NAME}  # not the backbone


def uninstall(model: PreTrainedModel) -> None:
    """Let it use PyTorch's again."""
    if model.config._attn_implementation == NAME:
        model.config._attn_implementation = {"": "sdpa"}
