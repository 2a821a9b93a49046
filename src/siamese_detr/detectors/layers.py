"""The Transformer layers of DETR, Conditional DETR and Deformable DETR, through their own sub-modules.

Equal to calling the layers, but without their finiteness test, which in training costs a device synchronisation per
layer. Gradient checkpointing, where enabled in the model, is honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint


def encoder_layer(layer: Any, tokens: Tensor, **attention: Any) -> Tensor:
    """One layer of an encoder.

    Args:
        layer: the stock layer.
        tokens: (B, L, D).
        attention: what its self-attention takes besides the tokens.
    """

    def run(tokens: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=tokens, **attention)
        tokens = _add(layer.self_attn_layer_norm, tokens, attended, layer)
        return _feed_forward(layer, tokens)

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
        queries = _add(layer.self_attn_layer_norm, queries, attended, layer)
        attended, _ = layer.encoder_attn(hidden_states=queries, **cross_attention)
        queries = _add(layer.encoder_attn_layer_norm, queries, attended, layer)
        return _feed_forward(layer, queries)

    return _checkpointed(layer, run, queries)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    return layer.final_layer_norm(x + layer.mlp(x))  # the block drops values itself


def _add(norm: Any, x: Tensor, branch: Tensor, layer: Any) -> Tensor:
    return norm(x + dropout(branch, layer.dropout, layer.training))


def _checkpointed(layer: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return checkpoint(run, x, use_reentrant=False)
    return run(x)
