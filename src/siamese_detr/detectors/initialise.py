"""Initial values of the Transformer, its queries and its heads as in the papers' codes, not as in Transformers.

Transformers draws every matrix from N(0, 0.02²); the papers use Xavier's uniform distribution in the Transformer,
PyTorch's defaults outside of it, unit normal queries, a class bias for which every class starts at probability 0.01
(focal loss, Lin et al. 2017 §4.1), and a box head that starts as "no shift from the reference point".
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


def reset(module: nn.Module) -> None:
    """PyTorch's default initialisation of every layer in `module`."""
    for child in module.modules():
        if child is not module or not any(True for _ in module.children()):
            reset_parameters = getattr(child, "reset_parameters", None)
            if callable(reset_parameters):
                reset_parameters()


@torch.no_grad()
def xavier(module: nn.Module) -> None:
    """Xavier-uniform matrices, as the papers' `Transformer` resets itself, with attention as in `packed_attention`."""
    reset(module)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    packed_attention(module)


@torch.no_grad()
def packed_attention(module: nn.Module) -> None:
    """Attention that is one `nn.MultiheadAttention` in the paper's code, as that starts it.

    It keeps query, key and value projections in one (3D, D) matrix, which makes Xavier's bound smaller by √2, and its
    biases are 0. Conditional DETR's decoder, whose projections have other names here, is not of that kind.
    """
    attention: Any
    for attention in module.modules():
        if hasattr(attention, "q_proj"):
            for name in ("q_proj", "k_proj", "v_proj"):
                nn.init.xavier_uniform_(getattr(attention, name).weight, gain=math.sqrt(0.5))
                nn.init.zeros_(getattr(attention, name).bias)
            output = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
            nn.init.zeros_(output.bias)


@torch.no_grad()
def deformable_attention(module: nn.Module) -> None:
    """Deformable DETR's own start (§A.4 of its paper): each head looks in its direction, point k at distance k,
    all points equally."""
    attention: Any
    for attention in module.modules():
        if not hasattr(attention, "sampling_offsets"):
            continue
        heads, points = attention.n_heads, attention.n_points
        levels = attention.n_levels
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack((angles.cos(), angles.sin()), -1)
        directions = directions / directions.abs().max(-1, keepdim=True).values
        distances = torch.arange(1, points + 1).view(1, 1, points, 1)
        bias = directions.view(heads, 1, 1, 2) * distances.expand(heads, levels, points, 2)
        nn.init.zeros_(attention.sampling_offsets.weight)
        attention.sampling_offsets.bias.copy_(bias.reshape(-1))
        nn.init.zeros_(attention.attention_weights.weight)
        nn.init.zeros_(attention.attention_weights.bias)
        for name in ("value_proj", "output_proj"):
            if hasattr(attention, name):
                nn.init.xavier_uniform_(getattr(attention, name).weight)
                nn.init.zeros_(getattr(attention, name).bias)


def box_head(head: nn.Module, zero_last: bool = True) -> None:
    """Box head: defaults, the last layer zero so that the first prediction is the reference point itself."""
    reset(head)
    if zero_last:
        last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


def class_head(head: Any, focal: bool = True, prior: float = 0.01) -> None:
    """Class head: defaults; with sigmoids, biases for which every class starts at probability `prior`. Embeddings of
    classes: unit normal."""
    head.reset_parameters()
    if focal and not isinstance(head, nn.Embedding):
        nn.init.constant_(head.bias, -math.log((1 - prior) / prior))
