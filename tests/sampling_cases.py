"""Inputs of deformable attention's sampling, and what a function gives for them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention


def stock(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    return MultiScaleDeformableAttention()(value, None, shapes, None, locations, weights, 64)


def random_inputs(
    shapes: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float64, reach: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """2 images, 7 queries, 2 heads of 4 channels, 3 points, some of them outside the maps."""
    random = torch.Generator().manual_seed(seed)
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(2, cells, 2, 4, generator=random, dtype=dtype)
    locations = 0.5 + reach * (torch.rand(2, 7, 2, len(shapes), 3, 2, generator=random, dtype=dtype) - 0.5)
    weights = torch.randn(2, 7, 2, len(shapes), 3, generator=random, dtype=dtype)
    return value, locations, weights


def outputs_and_gradients(function, inputs: tuple[Tensor, ...], shapes: list[tuple[int, int]]) -> list[Tensor]:
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    out = function(*inputs, shapes)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad(out, inputs, above)]
