"""The kernel of ``siamese_detr::deformable_sample`` for CPUs, which never stores a sample.

A thread sums the samples of all queries of one head of one image, whose values, packed together, stay in its core's
caches. What the backward pass needs is read and computed again. Results do not depend on the number of threads.

Numba compiles these loops when they are first called, in about a second each. They are not kept for the next process,
since Numba's cache consists of pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import torch
from numba import int32, uint64
from torch import Tensor

from siamese_detr.kernels.sampling import BACKWARD, NAME, check_shapes, pairs

FEWEST_POINTS = 30_000
"""From this many points on several threads pay."""

# Sums may be taken in another order, as the reference does, but NaN stays NaN.
compiled = numba.njit(nogil=True, fastmath={"contract", "reassoc", "nsz"}, error_model="numpy")


def sample(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """See ``sampling.deformable_sample``."""
    check_shapes(value, locations, weights, sizes)
    inputs = _inputs(value, locations, weights)
    out = inputs[0].new_empty(*weights.shape[:3], value.shape[3])
    _run(_sum, sizes, [*inputs, out])
    return out.flatten(2).to(value.dtype)


def sample_backward(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``value``, ``locations`` and ``weights`` from that of the result (B, Q, heads * C)."""
    given = (value, locations, weights)
    inputs = _inputs(*given)
    above = gradient.to(inputs[0].dtype).reshape(*weights.shape[:3], value.shape[3]).contiguous()
    results = [above.new_empty(x.shape) for x in given]
    _run(_spread, sizes, [*inputs, above, *results])
    to_value, to_locations, to_weights = (result.to(x.dtype) for result, x in zip(results, given, strict=True))
    return to_value, to_locations, to_weights


torch.library.impl(NAME, "cpu", sample)
torch.library.impl(BACKWARD, "cpu", sample_backward)


def _inputs(*tensors: Tensor) -> list[Tensor]:
    """What both kernels read, in at least single precision."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(dtype).contiguous() for x in tensors]


def _run(kernel: Callable[..., None], sizes: Sequence[int], tensors: list[Tensor]) -> None:
    """Run a kernel for every head of every image; ``tensors``, (B, ...) each, are what it reads and fills."""
    arrays, levels = [x.detach().numpy() for x in tensors], np.array(pairs(sizes))
    batch, _, heads, *_ = (weights := tensors[2]).shape

    def run(part: tuple[int, int]) -> None:
        image, head = part
        kernel(head, levels, *(x[image] for x in arrays))

    parts = [(image, head) for image in range(batch) for head in range(heads)]
    threads = torch.get_num_threads()
    if threads == 1 or weights.numel() < FEWEST_POINTS:
        for part in parts:
            run(part)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, parts))


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
def _unpack(head, table, value):
    """Fill one head of ``value`` (S, heads, C) with ``table`` (S * C)."""
    cells, heads, channels = value.shape
    value = value.reshape(-1)
    for cell in range(cells):
        first, place = uint64(cell * channels), uint64((cell * heads + head) * channels)
        for i in range(uint64(channels)):
            value[place + i] = table[first + i]


@compiled
def _sum(head, sizes, value, locations, weights, out):
    """Fill ``out`` (Q, heads, C) for one head of one image, whose values are (S, heads, C)."""
    queries, heads, levels, points = weights.shape
    table = np.ascontiguousarray(value[:, head]).reshape(-1)  # which the core's caches hold
    channels, kind = out.shape[2], table.dtype.type
    locations, weights = locations.reshape(-1), weights.reshape(-1)
    for query in range(queries):
        total = out[query, head]
        total[:] = 0
        at, start = uint64((query * heads + head) * levels * points), 0
        for level in range(levels):
            rows, columns = sizes[level]
            width, height = kind(columns), kind(rows)
            for _ in range(points):
                x = locations[uint64(2) * at] * width - kind(0.5)
                y = locations[uint64(2) * at + uint64(1)] * height - kind(0.5)
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
def _spread(head, sizes, value, locations, weights, gradient, to_value, to_locations, to_weights):
    """From the gradient (Q, heads, C) of what :func:`_sum` fills, those of its inputs."""
    queries, heads, levels, points = weights.shape
    table = np.ascontiguousarray(value[:, head]).reshape(-1)  # which the core's caches hold
    to_table = np.zeros_like(table)
    channels, kind = gradient.shape[2], table.dtype.type
    locations, weights = locations.reshape(-1), weights.reshape(-1)
    to_locations, to_weights = to_locations.reshape(-1), to_weights.reshape(-1)
    for query in range(queries):
        above = gradient[query, head]
        at, start = uint64((query * heads + head) * levels * points), 0
        for level in range(levels):
            rows, columns = sizes[level]
            width, height = kind(columns), kind(rows)
            for _ in range(points):
                x = locations[uint64(2) * at] * width - kind(0.5)
                y = locations[uint64(2) * at + uint64(1)] * height - kind(0.5)
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
                    to_x = (near_y * (rise_x * b - fall_x * a) + far_y * (rise_x * d - fall_x * c)) * width
                    to_y = (rise_y * bottom - fall_y * top) * weights[at] * height
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
    _unpack(head, to_table, to_value)


@numba.njit(inline="always")  # LLVM would leave it a call
def _add(share, row, table, first):
    for i in range(uint64(len(row))):
        table[first + i] += share * row[i]
