"""The sampling of deformable attention (Deformable DETR §4.1, eq. 3) on a CPU, without the samples in memory.

A thread sums the samples of all queries of one head of one image, whose values, packed together, stay in its core's
caches. What the backward pass needs is read and computed again. Results do not depend on the number of threads.

Numba compiles these loops when they are first called, in about a second each. They are not kept for the next process,
since Numba's cache consists of pickles.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import numba
import numpy as np
import torch
from numba import int32, uint64
from torch import Tensor

from siamese_detr.kernels.compiled import compiled
from siamese_detr.kernels.threads import on_all_threads

FEWEST_POINTS = 30_000
"""From which on several threads pay."""

Shapes = list[tuple[int, int]] | list[list[tuple[int, int]]]
"""(h, w) of each level, the same of all images, or of each image's own."""


@torch.compiler.disable
def sample(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: Shapes,
    reference: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """Weighted samples of every query.

    Args:
        value: (B, S, heads, C), the levels one after the other.
        locations: (B, Q, heads, levels, points, 2) as (x, y), 0 to 1 across each level; zeros are read outside. With
            ``reference``, their distances from it in cells of their level.
        weights: (B, Q, heads, levels, points).
        shapes: (h, w) of each level; or, for images packed one after the other (B = 1) that are sampled at their own
            tokens (Q = S), those of each image.
        reference: (B, Q, levels, 2), 0 to 1 across each level.
        shown: (B, S), False where zeros are to be read for the values.

    Returns:
        (B, Q, heads * C), in the precision of ``value``; computed in single precision at least.

    Raises:
        ValueError: the shapes do not belong together.
    """
    batch, queries, heads, levels, _ = weights.shape
    packed = _are_packed(shapes)
    images: Any = shapes if packed else [shapes]  # in a row of the batch
    cells = sum(map(_cells, images))
    fitting = (  # what is compiled does not look
        value.shape[:3] == (batch, cells, heads)
        and locations.shape == (*weights.shape, 2)
        and all(len(image) == levels for image in images)
        and (not packed or (batch == 1 and queries == cells))
        and (reference is None or reference.shape == (batch, queries, levels, 2))
        and (shown is None or shown.shape == value.shape[:2])
    )
    if not fitting:
        given = [None if x is None else tuple(x.shape) for x in (value, locations, weights, reference, shown)]
        raise ValueError(f"sampling from maps of {list(shapes)}: shapes that do not belong together: {given}")
    return _Sample.apply(value, locations, weights, shapes, reference, shown)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        shapes: Shapes,
        reference: Tensor | None,
        shown: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights, reference, shown)
        ctx.shapes = shapes
        inputs = _inputs(value, locations, weights, reference, shown)
        out = inputs[0].new_empty(*weights.shape[:3], value.shape[3])
        _run(_sum, shapes, reference is None, [*inputs, out])
        return out.flatten(2).to(value.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights, reference, shown = ctx.saved_tensors
        inputs = _inputs(value, locations, weights, reference, shown)
        above = gradient.to(inputs[0].dtype).reshape(*weights.shape[:3], value.shape[3]).contiguous()
        results = to_value, to_locations, to_weights = [above.new_empty(x.shape) for x in (value, locations, weights)]
        _run(_spread, ctx.shapes, reference is None, [*inputs, above, *results])
        to_reference = None
        if ctx.needs_input_grad[4]:
            to_reference = to_locations.sum((2, 4))
            for rows, levels in _images(ctx.shapes, len(value)):
                to_reference[rows] *= torch.tensor(levels).flip(-1)
        return to_value.to(value.dtype), to_locations, to_weights, None, to_reference, None


def _inputs(
    value: Tensor, locations: Tensor, weights: Tensor, reference: Tensor | None, shown: Tensor | None
) -> list[Tensor]:
    """What both kernels read: value, shown, locations, weights, reference; numbers in single precision at least."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    batch, queries, _, levels, _ = weights.shape
    if reference is None:
        reference = weights.new_zeros(batch, queries, levels, 2)
    if shown is None:
        shown = torch.ones(value.shape[:2], dtype=torch.bool)
    value, locations, weights, reference = (x.to(dtype).contiguous() for x in (value, locations, weights, reference))
    return [value, shown.bool().contiguous(), locations, weights, reference]


def _are_packed(shapes: Shapes) -> bool:
    return bool(shapes) and isinstance(shapes[0], list)


def _cells(levels: list[tuple[int, int]]) -> int:
    return sum(height * width for height, width in levels)


def _images(shapes: Any, batch: int) -> list[tuple[tuple[int, slice], list[tuple[int, int]]]]:
    """Of every image: where its rows are in tensors (B, Q or S, ...), and its levels' shapes."""
    if not _are_packed(shapes):
        return [((image, slice(None)), shapes) for image in range(batch)]
    starts = [0, *accumulate(map(_cells, shapes))]
    return [((0, slice(*ends)), levels) for ends, levels in zip(pairwise(starts), shapes, strict=True)]


def _run(kernel: Callable[..., None], shapes: Shapes, absolute: bool, tensors: list[Tensor]) -> None:
    """Run a kernel for every head of every image.

    Args:
        absolute: whether locations span a level from 0 to 1.
        tensors: what the kernel reads (:func:`_inputs` first) and fills, (B, ...) each.
    """
    arrays = [x.numpy() for x in tensors]
    batch, _, heads, *_ = (weights := tensors[3]).shape
    images = [(rows, np.array(levels)) for rows, levels in _images(shapes, batch)]

    def run(part: tuple[int, int]) -> None:
        image, head = part
        rows, sizes = images[image]
        kernel(head, sizes, absolute, *(x[rows] for x in arrays))

    parts = [(image, head) for image in range(len(images)) for head in range(heads)]
    on_all_threads(run, parts, 1 if weights.numel() < FEWEST_POINTS else None)


@compiled
def _frame(cells, centre, absolute, kind):
    """Along one axis of a level: its size, and how locations become places in cells, by a factor and a summand."""
    size = kind(cells)
    return size, size if absolute else kind(1), centre * size - kind(0.5)


@compiled
def _axis(place, size, kind):
    """Along one axis: the cells before and behind a place in (-1, size).

    Returns the index of the first of them that exists, how far the other one is, their shares of the sample, and how
    much these fall and rise with the place.
    """
    before = int32(place) - int32(place < kind(0))  # the floor: conversion rounds towards zero
    behind = before + int32(1)
    rest = place - kind(before)
    falling, rising = kind(before >= 0), kind(behind < size)
    first = max(before, int32(0))
    return first, min(behind, int32(size - 1)) - first, (kind(1) - rest) * falling, rest * rising, falling, rising


@compiled
def _corners(cell, right, below, channels):
    """Where the channels of the four cells around a point begin: of the first, and those so many cells after it."""
    top_left = uint64(cell * channels)
    bottom_left = top_left + uint64(below * channels)
    return top_left, top_left + uint64(right * channels), bottom_left, bottom_left + uint64(right * channels)


@compiled
def _pack(head, value, shown):
    """The values (S * C) of one head, which its core's caches hold; zeros for what is not shown."""
    cells, heads, channels = value.shape
    table, value = np.zeros(cells * channels, value.dtype), value.reshape(-1)
    for cell in range(cells):
        if shown[cell]:
            first, place = uint64(cell * channels), uint64((cell * heads + head) * channels)
            for i in range(uint64(channels)):
                table[first + i] = value[place + i]
    return table


@compiled
def _unpack(head, table, shown, value):
    """Fill one head of ``value`` (S, heads, C) with ``table`` (S * C), and with zeros where it is not shown."""
    cells, heads, channels = value.shape
    value = value.reshape(-1)
    for cell in range(cells):
        first, place = uint64(cell * channels), uint64((cell * heads + head) * channels)
        if shown[cell]:
            for i in range(uint64(channels)):
                value[place + i] = table[first + i]
        else:
            for i in range(uint64(channels)):
                value[place + i] = 0


@compiled
def _sum(head, sizes, absolute, value, shown, locations, weights, reference, out):
    """Fill ``out`` (Q, heads, C) for one head of one image, whose values are (S, heads, C)."""
    queries, heads, levels, points = weights.shape
    table = _pack(head, value, shown)
    channels, kind = out.shape[2], table.dtype.type
    locations, weights = locations.reshape(-1), weights.reshape(-1)
    for query in range(queries):
        total = out[query, head]
        total[:] = 0
        at, start = uint64((query * heads + head) * levels * points), 0
        for level in range(levels):
            rows, columns = sizes[level]
            width, x_scale, x_origin = _frame(columns, reference[query, level, 0], absolute, kind)
            height, y_scale, y_origin = _frame(rows, reference[query, level, 1], absolute, kind)
            for _ in range(points):
                x = locations[uint64(2) * at] * x_scale + x_origin
                y = locations[uint64(2) * at + uint64(1)] * y_scale + y_origin
                if x > kind(-1) and y > kind(-1) and x < width and y < height:
                    column, right, near_x, far_x, _, _ = _axis(x, columns, kind)
                    row, down, near_y, far_y, _, _ = _axis(y, rows, kind)
                    near_y *= weights[at]
                    far_y *= weights[at]
                    cell, below = start + row * columns + column, down * columns
                    top_left, top_right, bottom_left, bottom_right = _corners(cell, right, below, channels)
                    a, b, c, d = near_y * near_x, near_y * far_x, far_y * near_x, far_y * far_x
                    for i in range(uint64(channels)):
                        top = a * table[top_left + i] + b * table[top_right + i]
                        total[i] += top + (c * table[bottom_left + i] + d * table[bottom_right + i])
                elif np.isnan(x) or np.isnan(y) or np.isnan(weights[at]):
                    total[:] = np.nan
                at += uint64(1)
            start += rows * columns


@compiled
def _spread(
    head, sizes, absolute, value, shown, locations, weights, reference, gradient, to_value, to_locations, to_weights
):
    """From the gradient (Q, heads, C) of what :func:`_sum` fills, those of its inputs."""
    queries, heads, levels, points = weights.shape
    table = _pack(head, value, shown)
    to_table = np.zeros_like(table)
    channels, kind = gradient.shape[2], table.dtype.type
    locations, weights = locations.reshape(-1), weights.reshape(-1)
    to_locations, to_weights = to_locations.reshape(-1), to_weights.reshape(-1)
    for query in range(queries):
        above = gradient[query, head]
        at, start = uint64((query * heads + head) * levels * points), 0
        for level in range(levels):
            rows, columns = sizes[level]
            width, x_scale, x_origin = _frame(columns, reference[query, level, 0], absolute, kind)
            height, y_scale, y_origin = _frame(rows, reference[query, level, 1], absolute, kind)
            for _ in range(points):
                x = locations[uint64(2) * at] * x_scale + x_origin
                y = locations[uint64(2) * at + uint64(1)] * y_scale + y_origin
                to_x = to_y = to_weight = kind(0)
                if x > kind(-1) and y > kind(-1) and x < width and y < height:
                    column, right, near_x, far_x, fall_x, rise_x = _axis(x, columns, kind)
                    row, down, near_y, far_y, fall_y, rise_y = _axis(y, rows, kind)
                    cell, below = start + row * columns + column, down * columns
                    top_left, top_right, bottom_left, bottom_right = _corners(cell, right, below, channels)
                    a = b = c = d = kind(0)
                    for i in range(uint64(channels)):
                        a += table[top_left + i] * above[i]
                        b += table[top_right + i] * above[i]
                        c += table[bottom_left + i] * above[i]
                        d += table[bottom_right + i] * above[i]
                    top, bottom = near_x * a + far_x * b, near_x * c + far_x * d
                    to_weight = near_y * top + far_y * bottom
                    near_y *= weights[at]
                    far_y *= weights[at]
                    to_x = (near_y * (rise_x * b - fall_x * a) + far_y * (rise_x * d - fall_x * c)) * x_scale
                    to_y = (rise_y * bottom - fall_y * top) * weights[at] * y_scale
                    _add(near_y * near_x, above, to_table, top_left)
                    _add(near_y * far_x, above, to_table, top_right)
                    _add(far_y * near_x, above, to_table, bottom_left)
                    _add(far_y * far_x, above, to_table, bottom_right)
                elif np.isnan(x) or np.isnan(y) or np.isnan(weights[at]):
                    to_x = to_y = to_weight = kind(np.nan)
                to_locations[uint64(2) * at], to_locations[uint64(2) * at + uint64(1)] = to_x, to_y
                to_weights[at] = to_weight
                at += uint64(1)
            start += rows * columns
    _unpack(head, to_table, shown, to_value)


@numba.njit(inline="always")  # LLVM would leave it a call
def _add(share, row, table, first):
    for i in range(uint64(len(row))):
        table[first + i] += share * row[i]
