"""The sampling of deformable attention (Deformable DETR §4.1, eq. 3): ``siamese_detr::deformable_sample``.

Here stands its reference, which runs on any device. Transformers' modules have an equal one of their own and keep it
unless ``siamese_detr.kernels.accelerate`` puts this operation in its place, for which faster kernels are registered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("siamese_detr::deformable_sample", mutates_args=())
def deformable_sample(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """The weighted sum of every query's samples.

    Args:
        value: (B, S, heads, C), the levels one after the other.
        locations: (B, Q, heads, levels, points, 2) as (x, y), 0 to 1 across each level; outside are zeros.
        weights: (B, Q, heads, levels, points).
        sizes: height and width of each level, one after the other; the products sum to S.

    Returns:
        (B, Q, heads * C) in the precision of ``value``; computed in at least single precision.

    Raises:
        ValueError: the shapes do not belong together.
    """
    check_shapes(value, locations, weights, sizes)
    total = value.new_zeros(())
    for maps, grid, shares in _levels(value, locations, weights, sizes):
        samples = F.grid_sample(maps, grid, align_corners=False)  # (B * heads, C, Q, points)
        total = total + (samples * shares).sum(-1)
    return _queries_first(total, value).to(value.dtype)


@torch.library.custom_op("siamese_detr::deformable_sample_backward", mutates_args=())
def deformable_sample_backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``value``, ``locations`` and ``weights`` from that of the result (B, Q, heads * C)."""
    batch, _, heads, channels = value.shape
    above = _full(gradient).unflatten(2, (heads, channels)).permute(0, 2, 3, 1).flatten(0, 1)[..., None]
    to_value, to_locations, to_weights = [], [], []
    for maps, grid, shares in _levels(value, locations, weights, sizes):
        samples = F.grid_sample(maps, grid, align_corners=False)
        to_weights.append((samples * above).sum(1))  # (B * heads, Q, points)
        to_maps, to_grid = torch.ops.aten.grid_sampler_2d_backward(
            above * shares, maps, grid, 0, 0, False, (True, True)
        )
        to_value.append(to_maps.flatten(2).unflatten(0, (batch, heads)).permute(0, 3, 1, 2))
        to_locations.append(2 * to_grid)  # the grid spans a level from -1 to 1
    heads_last = [torch.stack(x, 2).unflatten(0, (batch, heads)).transpose(1, 2) for x in (to_locations, to_weights)]
    return (
        torch.cat(to_value, 1).to(value.dtype),
        heads_last[0].to(locations.dtype).contiguous(),
        heads_last[1].to(weights.dtype).contiguous(),
    )


def check_shapes(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> None:
    """Raise ValueError unless the shapes are as :func:`deformable_sample` asks for: kernels do not look."""
    batch, _, heads, levels, _ = weights.shape
    cells = sum(height * width for height, width in pairs(sizes))
    fits = value.shape[:3] == (batch, cells, heads) and locations.shape == (*weights.shape, 2)
    if not fits or len(sizes) != 2 * levels:
        shapes = [tuple(x.shape) for x in (value, locations, weights)]
        raise ValueError(f"sampling from maps of {list(sizes)}: shapes that do not belong together: {shapes}")


def pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each level."""
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _levels(
    value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each level: maps (B * heads, C, h, w), grid (B * heads, Q, points, 2), weights (B * heads, 1, Q, points)."""
    shapes = pairs(sizes)
    parts = _full(value).split([height * width for height, width in shapes], dim=1)
    grids = (2 * _full(locations) - 1).transpose(1, 2).flatten(0, 1).to(parts[0].dtype)
    shares = _full(weights).transpose(1, 2).flatten(0, 1).to(parts[0].dtype)
    for level, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        maps = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, shape)
        yield maps, grids[:, :, level], shares[:, None, :, level]


def _queries_first(x: Tensor, value: Tensor) -> Tensor:
    """(B * heads, C, Q) -> (B, Q, heads * C)."""
    return x.unflatten(0, (len(value), value.shape[2])).flatten(1, 2).transpose(1, 2).contiguous()


def _full(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


@deformable_sample.register_fake
def _(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


@deformable_sample_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *deformable_sample_backward(gradient, *ctx.saved_tensors, ctx.sizes), None


deformable_sample.register_autograd(_gradients, setup_context=_keep_inputs)
