"""The Transformer layers of DETR, Conditional DETR and Deformable DETR, through their own sub-modules.

Equal to calling the layers, but without their finiteness test, which in training costs a device synchronisation per
layer, and with dropout, feed-forward blocks and norms that are fast on a CPU and on a GPU. Gradient checkpointing,
where enabled in the model, is honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from siamese_detr.kernels.feed_forward import feed_forward
from siamese_detr.kernels.layer_norm import add_norm


def encoder_layer(layer: Any, tokens: Tensor, **attention: Any) -> Tensor:
    """One layer of an encoder.

    Args:
        layer: the stock layer.
        tokens: (B, L, D).
        attention: what its self-attention takes besides the tokens.
    """

    def run(tokens: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=tokens, **attention)
        tokens = add_norm(layer.self_attn_layer_norm, tokens, attended, layer.dropout, layer.training)
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
        queries = add_norm(layer.self_attn_layer_norm, queries, attended, layer.dropout, layer.training)
        attended, _ = layer.encoder_attn(hidden_states=queries, **cross_attention)
        queries = add_norm(layer.encoder_attn_layer_norm, queries, attended, layer.dropout, layer.training)
        return _feed_forward(layer, queries)

    return _checkpointed(layer, run, queries)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    block = layer.mlp
    return add_norm(layer.final_layer_norm, x, feed_forward(block, x), block.dropout, block.training)


def _checkpointed(layer: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        return checkpoint(run, x, use_reentrant=False)
    return run(x)
