"""The sampling of deformable attention (Deformable DETR §4.1, eq. 3) on a GPU, without the samples in memory.

A program sums the samples of a few queries of one head of one image. What the backward pass needs is read and computed
again; it adds to the values' gradient in single precision, in no fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES, WARPS = 16, 2
"""Queries of a program, and warps that compute them."""


@torch.compiler.disable
def sample(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    sizes: Tensor,
    starts: Tensor,
    reference: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """Weighted samples of every query.

    Args:
        value: (B, S, heads, C), the levels one after the other.
        locations: (B, Q, heads, levels, points, 2) as (x, y), 0 to 1 across each level; zeros are read outside. With
            ``reference``, their distances from it in cells of their level.
        weights: (B, Q, heads, levels, points).
        sizes: int64 (levels, 2), (h, w) of each level.
        starts: int64 (levels,), index of its first token.
        reference: (B, Q, levels, 2), 0 to 1 across each level.
        shown: (B, S), False where zeros are to be read for the values.

    Returns:
        (B, Q, heads * C), in the precision of ``value``; computed in single precision at least.
    """
    return _Sample.apply(value, locations, weights, sizes, starts, reference, shown)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        sizes: Tensor,
        starts: Tensor,
        reference: Tensor | None,
        shown: Tensor | None,
    ) -> Tensor:
        if shown is not None:
            value = value.masked_fill(~shown.bool()[:, :, None, None], 0)
        given = (value, locations, weights, sizes, starts, reference)
        inputs = [None if x is None else x.contiguous() for x in given]
        ctx.save_for_backward(*inputs, shown)
        batch, queries, heads = locations.shape[:3]
        out = value.new_empty(batch, queries, heads * value.shape[3])
        _launch(_sum, inputs, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, shown = ctx.saved_tensors
        value, locations, weights, sizes, _, reference = inputs
        to_value = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
        to_locations, to_weights = torch.empty_like(locations), torch.empty_like(weights)
        _launch(_spread, inputs, gradient.contiguous(), to_value, to_locations, to_weights)
        to_value = to_value.to(value.dtype)
        if shown is not None:
            to_value.masked_fill_(~shown.bool()[:, :, None, None], 0)
        to_reference = None
        if ctx.needs_input_grad[5]:
            to_reference = to_locations.sum((2, 4), dtype=reference.dtype) * sizes.flip(-1)
        return to_value, to_locations, to_weights, None, None, to_reference, None


def _launch(kernel: Any, inputs: list[Any], *results: Tensor) -> None:
    value, locations, weights, sizes, starts, reference = inputs
    batch, queries, heads, levels, points = weights.shape
    tokens, channels = value.shape[1], value.shape[3]
    if not weights.numel():
        return
    precise = tl.float64 if value.dtype == torch.float64 else tl.float32
    width = triton.next_power_of_2(channels)
    around = reference is not None
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(queries, QUERIES) * batch * heads,)](
            *(value, locations, reference if around else locations, weights, sizes, starts, *results),
            *(tokens, queries, heads, channels, levels, points),
            *(around, QUERIES, width, precise),
            num_warps=WARPS,
        )


@triton.jit
def _part(queries, heads, QUERIES: tl.constexpr):
    """Image, head and queries of a program. All are in the grid's first direction: CUDA allows few in the others."""
    blocks = tl.cdiv(queries, QUERIES)
    table, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    return table // heads, table % heads, block * QUERIES + tl.arange(0, QUERIES)


@triton.jit
def _level(level, sizes, starts, image, head, tokens, heads, channels):
    """Where a level's values of an image and head begin, its height and its width."""
    first = image.to(tl.int64) * tokens + tl.load(starts + level)
    height, width = tl.load(sizes + 2 * level).to(tl.int32), tl.load(sizes + 2 * level + 1).to(tl.int32)
    return (first * heads + head) * channels, height, width


@triton.jit
def _point(weights, locations, reference, at, near, inside, width, height, AROUND: tl.constexpr, PRECISE: tl.constexpr):
    """A point of each query: its weight, the cell to its upper left, and how far right and down of that it lies."""
    weight = tl.load(weights + at, mask=inside, other=0.0).to(PRECISE)
    x = tl.load(locations + 2 * at, mask=inside, other=0.0).to(PRECISE)
    y = tl.load(locations + 2 * at + 1, mask=inside, other=0.0).to(PRECISE)
    if AROUND:
        x += tl.load(reference + 2 * near, mask=inside, other=0.0).to(PRECISE) * width
        y += tl.load(reference + 2 * near + 1, mask=inside, other=0.0).to(PRECISE) * height
    else:
        x *= width
        y *= height
    x -= 0.5
    y -= 0.5
    left, top = tl.floor(x), tl.floor(y)
    return weight, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def _corner(
    table, columns, rows, right, down, RIGHT: tl.constexpr, DOWN: tl.constexpr, width, height, row_size, channel, shown
):
    """One of the four cells around points: where its channels lie, which of them exist, its share of the sample."""
    column, row = columns + RIGHT, rows + DOWN
    exists = shown & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    places = table + ((row * width + column).to(tl.int64) * row_size)[:, None] + channel[None, :]
    share = (right if RIGHT else 1 - right) * (down if DOWN else 1 - down)
    return places, exists, share


@triton.jit
def _sum(
    value, locations, reference, weights, sizes, starts, out, tokens, queries, heads, channels, levels, points,
    AROUND: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    image, head, query = _part(queries, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    inside, real = query < queries, channel < channels
    asked = image.to(tl.int64) * queries + query
    owner = asked * heads + head
    total = tl.zeros((QUERIES, WIDTH), PRECISE)
    for level in range(levels):
        table, height, width = _level(level, sizes, starts, image, head, tokens, heads, channels)
        for point in range(points):
            at = (owner * levels + level) * points + point
            weight, columns, rows, right, down = _point(
                weights, locations, reference, at, asked * levels + level, inside, width, height, AROUND, PRECISE
            )
            for corner in tl.static_range(4):
                places, exists, share = _corner(
                    table, columns, rows, right, down, corner % 2, corner // 2,
                    width, height, heads * channels, channel, inside,
                )  # fmt: skip
                cells = tl.load(value + places, mask=exists[:, None] & real[None, :], other=0.0).to(PRECISE)
                total += (weight * share)[:, None] * cells
    places = out + owner[:, None] * channels + channel[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _spread(
    value, locations, reference, weights, sizes, starts, gradient, to_value, to_locations, to_weights,
    tokens, queries, heads, channels, levels, points,
    AROUND: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    image, head, query = _part(queries, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    inside, real = query < queries, channel < channels
    asked = image.to(tl.int64) * queries + query
    owner = asked * heads + head
    gradient += owner[:, None] * channels + channel[None, :]
    above = tl.load(gradient, mask=inside[:, None] & real[None, :], other=0.0).to(PRECISE)
    for level in range(levels):
        table, height, width = _level(level, sizes, starts, image, head, tokens, heads, channels)
        for point in range(points):
            at = (owner * levels + level) * points + point
            weight, columns, rows, right, down = _point(
                weights, locations, reference, at, asked * levels + level, inside, width, height, AROUND, PRECISE
            )
            to_x, to_y, to_weight = tl.zeros_like(right), tl.zeros_like(right), tl.zeros_like(right)
            for corner in tl.static_range(4):
                places, exists, share = _corner(
                    table, columns, rows, right, down, corner % 2, corner // 2,
                    width, height, heads * channels, channel, inside,
                )  # fmt: skip
                known = exists[:, None] & real[None, :]
                cells = tl.load(value + places, mask=known, other=0.0).to(PRECISE)
                agreement = tl.sum(cells * above, 1)
                to_weight += share * agreement
                to_x += agreement * (down if corner // 2 else 1 - down) * (1 if corner % 2 else -1)
                to_y += agreement * (right if corner % 2 else 1 - right) * (1 if corner // 2 else -1)
                tl.atomic_add(to_value + places, (weight * share)[:, None] * above, mask=known, sem="relaxed")
            tl.store(to_weights + at, to_weight.to(to_weights.dtype.element_ty), mask=inside)
            to_x *= weight if AROUND else weight * width
            to_y *= weight if AROUND else weight * height
            tl.store(to_locations + 2 * at, to_x.to(to_locations.dtype.element_ty), mask=inside)
            tl.store(to_locations + 2 * at + 1, to_y.to(to_locations.dtype.element_ty), mask=inside)
