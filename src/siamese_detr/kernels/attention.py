"""Attention for training on a CPU, with the dropout that is fast there.

Without dropout, on other devices, and compiled, everything is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from siamese_detr.detectors.functional import product_dtype
from siamese_detr.kernels.dropout import dropped_product, levels

NAME = "siamese_detr"
"""Under which Transformers knows :func:`attention`. It is never saved: a configuration file says nothing of it."""


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
    dropped = levels(dropout, query)
    if not dropped:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    scores = query * (query.shape[-1] ** -0.5 if scaling is None else scaling) @ key.transpose(-1, -2)
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, lowest)
    elif attention_mask is not None:
        scores = scores + attention_mask.clamp(min=lowest).to(scores.dtype)
    value = value.to(product_dtype(value))
    weights = scores.softmax(-1).to(value.dtype)
    return dropped_product(weights, value, dropped).transpose(1, 2).contiguous(), None


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
