"""The kernel of ``siamese_detr::deformable_sample`` for CUDA devices, which never stores a sample.

A program sums the samples of a few queries of one head of one image. What the backward pass needs is read and computed
again; it adds to the values' gradient in single precision, in no fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from siamese_detr.kernels.sampling import BACKWARD, NAME, check_shapes, pairs
from siamese_detr.runtime.gpu import send

QUERIES, WARPS = 16, 2
"""Queries of a program, and warps that compute them."""


def sample(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """See ``sampling.deformable_sample``."""
    check_shapes(value, locations, weights, sizes)
    batch, queries, heads = weights.shape[:3]
    out = value.new_empty(batch, queries, heads * value.shape[3])
    _launch(_sum, _inputs(value, locations, weights, sizes), out)
    return out


def sample_backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``value``, ``locations`` and ``weights`` from that of the result (B, Q, heads * C)."""
    to_value = torch.zeros_like(value, dtype=torch.promote_types(value.dtype, torch.float32))
    to_value = to_value.contiguous()
    to_locations, to_weights = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (locations, weights))
    inputs = _inputs(value, locations, weights, sizes)
    _launch(_spread, inputs, gradient.contiguous(), to_value, to_locations, to_weights)
    return to_value.to(value.dtype), to_locations, to_weights


torch.library.impl(NAME, "cuda", sample)
torch.library.impl(BACKWARD, "cuda", sample_backward)


def _inputs(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return [value.contiguous(), locations.contiguous(), weights.contiguous(), *_levels(tuple(sizes), value.device)]


@functools.lru_cache(maxsize=256)  # views come in few sizes, and every layer asks
def _levels(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """(h, w) of each level and the index of its first token, on the device."""
    starts = [0, *accumulate(height * width for height, width in pairs(sizes))][:-1]
    return send(torch.tensor(pairs(sizes)), device), send(torch.tensor(starts), device)


def _launch(kernel: Any, inputs: list[Any], *results: Tensor) -> None:
    value, locations, weights, sizes, starts = inputs
    batch, queries, heads, levels, points = weights.shape
    tokens, channels = value.shape[1], value.shape[3]
    if not weights.numel():
        return
    precise = tl.float64 if value.dtype == torch.float64 else tl.float32
    width = triton.next_power_of_2(channels)
    with torch.cuda.device_of(value):
        kernel[(triton.cdiv(queries, QUERIES) * batch * heads,)](
            *(value, locations, weights, sizes, starts, *results),
            *(tokens, queries, heads, channels, levels, points),
            *(QUERIES, width, precise),
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
def _point(weights, locations, at, inside, width, height, PRECISE: tl.constexpr):
    """A point of each query: its weight, the cell to its upper left, and how far right and down of that it lies."""
    weight = tl.load(weights + at, mask=inside, other=0.0).to(PRECISE)
    x = tl.load(locations + 2 * at, mask=inside, other=0.0).to(PRECISE)
    y = tl.load(locations + 2 * at + 1, mask=inside, other=0.0).to(PRECISE)
    x = x * width - 0.5
    y = y * height - 0.5
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
    value, locations, weights, sizes, starts, out, tokens, queries, heads, channels, levels, points,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    image, head, query = _part(queries, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    inside, real = query < queries, channel < channels
    owner = (image.to(tl.int64) * queries + query) * heads + head
    total = tl.zeros((QUERIES, WIDTH), PRECISE)
    for level in range(levels):
        table, height, width = _level(level, sizes, starts, image, head, tokens, heads, channels)
        for point in range(points):
            at = (owner * levels + level) * points + point
            weight, columns, rows, right, down = _point(weights, locations, at, inside, width, height, PRECISE)
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
    value, locations, weights, sizes, starts, gradient, to_value, to_locations, to_weights,
    tokens, queries, heads, channels, levels, points,
    QUERIES: tl.constexpr, WIDTH: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    image, head, query = _part(queries, heads, QUERIES)
    channel = tl.arange(0, WIDTH)
    inside, real = query < queries, channel < channels
    owner = (image.to(tl.int64) * queries + query) * heads + head
    gradient += owner[:, None] * channels + channel[None, :]
    above = tl.load(gradient, mask=inside[:, None] & real[None, :], other=0.0).to(PRECISE)
    for level in range(levels):
        table, height, width = _level(level, sizes, starts, image, head, tokens, heads, channels)
        for point in range(points):
            at = (owner * levels + level) * points + point
            weight, columns, rows, right, down = _point(weights, locations, at, inside, width, height, PRECISE)
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
            to_x *= weight * width
            to_y *= weight * height
            tl.store(to_locations + 2 * at, to_x.to(to_locations.dtype.element_ty), mask=inside)
            tl.store(to_locations + 2 * at + 1, to_y.to(to_locations.dtype.element_ty), mask=inside)
