"""The Transformer layers of DETR, Conditional DETR and Deformable DETR, through their own sub-modules.

Equal to calling the layers, but without their finiteness test, which in training costs a device synchronisation per
layer, and with dropout and feed-forward blocks that are fast on a CPU. Gradient checkpointing, where enabled in the
model, is honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dropout import residual
from .feed_forward import add_feed_forward


def encoder_layer(layer: Any, tokens: Tensor, **attention: Any) -> Tensor:
    """One layer of an encoder.

    Args:
        layer: the stock layer.
        tokens: (B, L, D).
        attention: what its self-attention takes besides the tokens.
    """

    def run(tokens: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=tokens, **attention)
        tokens = layer.self_attn_layer_norm(residual(tokens, attended, layer.dropout, layer.training))
        return layer.final_layer_norm(add_feed_forward(layer.mlp, tokens))

    return _checkpointed(layer, run, tokens)


def decoder_layer(
    layer: Any, queries: Tensor, self_attention: dict[str, Any], cross_attention: dict[str, Any]
) -> Tensor:
    """One layer of a decoder.

    Args:
        layer: the stock layer.
        queries: (B, Q, D).
        self_attention, cross_attention: what the attentions take besides the queries.
    """

    def run(queries: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=queries, **self_attention)
        queries = layer.self_attn_layer_norm(residual(queries, attended, layer.dropout, layer.training))
        attended, _ = layer.encoder_attn(hidden_states=queries, **cross_attention)
        queries = layer.encoder_attn_layer_norm(residual(queries, attended, layer.dropout, layer.training))
        return layer.final_layer_norm(add_feed_forward(layer.mlp, queries))

    return _checkpointed(layer, run, queries)


def _checkpointed(layer: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return checkpoint(run, x, use_reentrant=False)
    return run(x)
