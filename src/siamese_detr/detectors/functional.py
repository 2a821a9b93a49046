"""What the adapters share: layers, attention masks, sine embeddings, boxes relative to reference points."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

from siamese_detr.errors import UserError
from siamese_detr.runtime.gpu import send


def full_precision(x: Tensor) -> Tensor:
    """`x`, or its float32 copy if it is of lower precision: boxes are never computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def backbone_maps(network: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """The network's maps (B, C, h, w), finest first, whether it is timm's or one of Transformers."""
    maps = network(pixel_values)
    return list(maps if isinstance(maps, list | tuple) else maps.feature_maps)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """logit(x), with both x and 1 - x kept above `eps`."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_embedding(points: Tensor, features: int, temperature: float = 10000.0) -> Tensor:
    """Sine/cosine embedding of points in [0, 1] (Conditional DETR §3.2, DAB-DETR §4.1), y before x.

    Args:
        points: (..., 2 or 4) as (x, y[, w, h]).
        features: length of the embedding of one coordinate (even).

    Returns:
        (..., 2 or 4 times `features`), in the precision of `points` (computed in at least float32).
    """
    exact = full_precision(points)
    index = torch.arange(features, dtype=exact.dtype, device=points.device)
    period = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / features)
    angles = exact[..., None] * (2 * math.pi) / period
    waves = torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)
    x, y, *rest = waves.unbind(-2)
    return torch.cat((y, x, *rest), dim=-1).to(points.dtype)


def sine_positions(embedding: nn.Module, x: Tensor, valid: Tensor) -> Tensor:
    """Transformers' sine embedding of a map's cells, computed in at least single precision: in half precision it is
    coarse, and Deformable DETR's, which shifts cells by half of one, is no number in rows and columns of padding.

    Args:
        embedding: the stock module.
        x: the map (B, C, H, W).
        valid: (B, H, W), False where it is padded.

    Returns:
        (B, H * W, D).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return embedding(shape=x.shape, device=x.device, dtype=dtype, mask=valid).flatten(2).transpose(1, 2)


def valid_ratios(model: Any, masks: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Transformers' shares of levels inside their images, in at least single precision: by a share in bfloat16, places
    in large maps are off by a whole cell.

    Args:
        model: the stock model.
        masks: (B, h, w) boolean for each level, True = inside the image.
        dtype: of the tokens.

    Returns:
        (B, levels, 2) shares of the width and of the height.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    return torch.stack([model.get_valid_ratio(mask, dtype=dtype) for mask in masks], 1)


def constant(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor of numbers that the host knows; unlike with ``torch.tensor``, it waits for no accelerator."""
    return send(torch.tensor(values, dtype=dtype), device)


def level_arguments(shapes: list[tuple[int, int]], device: torch.device) -> dict[str, Any]:
    """What the stock modules of deformable attention ask about levels: their (h, w), on the device and on the host, and
    the index of each one's first token.
    """
    sizes = constant(shapes, device)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    return dict(spatial_shapes=sizes, spatial_shapes_list=shapes, level_start_index=starts)


def additive_mask(may_attend: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Boolean (Q, Q), True = may attend, as the additive (1, 1, Q, Q) every attention implementation takes."""
    if may_attend is None:
        return None
    blocked = torch.zeros(may_attend.shape, dtype=dtype, device=may_attend.device)
    return blocked.masked_fill_(~may_attend, torch.finfo(dtype).min)[None, None]


def padding_mask(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean (B, L), True = may be attended to, as the additive (B, 1, 1, L) every attention implementation takes.

    Transformers' own masks first ask whether anything is masked, which makes the host wait for the device.
    """
    blocked = torch.zeros(valid.shape, dtype=dtype, device=valid.device)
    return blocked.masked_fill_(~valid, torch.finfo(dtype).min)[:, None, None]


def level_mask(pixel_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    """Boolean (B, H, W) of valid pixels -> boolean (B, h, w) of valid cells, by nearest neighbour as the DETRs do."""
    return nn.functional.interpolate(pixel_mask[None].float(), size=shape)[0].bool()


def best_tokens(scores: Tensor, count: int) -> Tensor:
    """(B, count) indices of the tokens with the highest class score in ``scores`` (B, tokens, classes).

    Raises:
        UserError: there are fewer tokens.
    """
    if scores.shape[1] < count:
        raise UserError(
            f"an image of this size gives {scores.shape[1]} tokens, too few for {count} queries: use a larger "
            "image_size or fewer queries (num_queries)"
        )
    return scores.max(-1).values.topk(count, dim=1).indices


def spread_tokens(count: int, shapes: list[tuple[int, int]], valid: Tensor) -> Tensor:
    """Indices of `count` tokens that cover the image and all levels evenly, in such an order that every stretch does.

    An additive recurrence in three dimensions (level, y, x) with the powers of the root of x⁴ = x + 1, the
    generalised golden ratio.

    Args:
        count: number of tokens Q.
        shapes: (h, w) of the levels.
        valid: (B, 2) share of the width and height inside the image; tokens beyond are not chosen.

    Returns:
        (B, Q) indices into the concatenated levels. The outermost 2 % of an image are left out.
    """
    steps = constant([1.2207440846057596**-power for power in (1, 2, 3)], valid.device, torch.float64)
    level, y, x = ((0.5 + torch.arange(count, device=valid.device)[:, None] * steps) % 1).unbind(1)
    levels = level_arguments(shapes, valid.device)
    sizes, starts = levels["spatial_shapes"], levels["level_start_index"]
    level = (level * len(shapes)).long()
    inner = [0.02 + 0.96 * share for share in (x, y)]
    column, row = (
        (inner[i] * valid[:, i, None] * sizes[level, 1 - i]).long().clamp(max=sizes[level, 1 - i] - 1) for i in (0, 1)
    )
    return starts[level] + row * sizes[level, 1] + column


def encoder_layer(layer: Any, tokens: Tensor, **attention: Any) -> Tensor:
    """One layer of DETR's, Conditional DETR's or Deformable DETR's encoder.

    It runs through its sub-modules: equal to calling it, but without its finiteness test, which in training costs a
    device synchronisation. Gradient checkpointing, where enabled in the model, is honoured.

    Args:
        layer: the stock layer.
        tokens: (B, L, D).
        attention: what its self-attention takes besides the tokens.
    """

    def run(tokens: Tensor) -> Tensor:
        attended, _ = layer.self_attn(hidden_states=tokens, **attention)
        tokens = layer.self_attn_layer_norm(tokens + dropout(attended, layer.dropout, layer.training))
        return layer.final_layer_norm(tokens + layer.mlp(tokens))  # the block drops values itself

    if layer.training and layer.gradient_checkpointing:
        return checkpoint(run, tokens, use_reentrant=False)
    return run(tokens)
