"""The transforms of Winograd's minimal filtering, see :mod:`.winograd`, on a CPU, tile by tile.

Numba compiles these loops in some four seconds when they are first called.
"""

from __future__ import annotations

import numpy as np
from numba import uint64

from siamese_detr.kernels.compiled import compiled


@compiled
def transform_input(x, out):
    """Fill ``out`` (36, T, C) with ``B' d B`` of all tiles of ``x`` (B, H, W, C)."""
    batch, height, width, channels = x.shape
    count = out.shape[1]
    down, across = (height + 3) // 4, (width + 3) // 4
    x, out = x.reshape(-1), out.reshape(-1)
    pixel, row = uint64(channels), uint64((4 * across + 2) * channels)
    padded, half = np.zeros(uint64(6) * row, x.dtype), np.empty(uint64(6) * row, x.dtype)
    for line in range(batch * down):
        for i in range(6):
            y, to = 4 * (line % down) + i - 1, uint64(i) * row + pixel
            if 0 <= y < height:
                start = uint64(((line // down) * height + y) * width * channels)
                for k in range(uint64(width * channels)):
                    padded[to + k] = x[start + k]
            else:
                for k in range(uint64(width * channels)):
                    padded[to + k] = 0
        _times_b(padded, uint64(0), row, half, uint64(0), row, row)
        for column in range(across):
            for i in range(6):
                start = uint64(i) * row + uint64(4 * column) * pixel
                to = uint64((6 * i * count + line * across + column) * channels)
                _times_b(half, start, pixel, out, to, uint64(count * channels), pixel)


@compiled
def transform_products(products, bias, relu, out):
    """Fill ``out`` (B, H, W, C) with ``A' M A`` of ``products`` (36, T, C), plus ``bias``, and with ReLU or without."""
    batch, height, width, channels = out.shape
    count, least = products.shape[1], out.dtype.type(0 if relu else -np.inf)
    down, across = (height + 3) // 4, (width + 3) // 4
    products, out = products.reshape(-1), out.reshape(-1)
    pixel = uint64(channels)
    half, done = np.empty(uint64(24) * pixel, out.dtype), np.empty(uint64(4) * pixel, out.dtype)
    for line in range(batch * down):
        for column in range(across):
            for i in range(6):
                start = uint64((i * count + line * across + column) * channels)
                _times_a(
                    products, start, uint64(6 * count * channels), half, uint64(i) * pixel, uint64(6) * pixel, pixel
                )
            top, left = 4 * (line % down), 4 * column
            for i in range(min(4, height - top)):
                _times_a(half, uint64(6 * i) * pixel, pixel, done, uint64(0), pixel, pixel)
                to = uint64((((line // down) * height + top + i) * width + left) * channels)
                for j in range(uint64(min(4, width - left))):
                    for k in range(pixel):
                        out[to + j * pixel + k] = max(done[j * pixel + k] + bias[k], least)


@compiled
def _times_b(x, a, step, out, to, apart, length):
    """``B'`` times the six vectors of ``x`` that begin at ``a`` and ``step`` apart; six of ``out``, ``apart``."""
    two, four, five = x.dtype.type(2), x.dtype.type(4), x.dtype.type(5)
    b, c, d = a + step, a + (step + step), a + uint64(3) * step
    e, f = d + step, d + (step + step)
    for k in range(length):
        out[to + k] = four * x[a + k] - five * x[c + k] + x[e + k]
    to += apart
    for k in range(length):
        out[to + k] = (x[e + k] - four * x[c + k]) + (x[d + k] - four * x[b + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[e + k] - four * x[c + k]) - (x[d + k] - four * x[b + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[e + k] - x[c + k]) + two * (x[d + k] - x[b + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[e + k] - x[c + k]) - two * (x[d + k] - x[b + k])
    to += apart
    for k in range(length):
        out[to + k] = four * x[b + k] - five * x[d + k] + x[f + k]


@compiled
def _times_a(x, a, step, out, to, apart, length):
    """``A'`` times the six vectors of ``x`` that begin at ``a`` and ``step`` apart; four of ``out``, ``apart``."""
    two, four, eight = x.dtype.type(2), x.dtype.type(4), x.dtype.type(8)
    b, c, d = a + step, a + (step + step), a + uint64(3) * step
    e, f = d + step, d + (step + step)
    for k in range(length):
        out[to + k] = x[a + k] + (x[b + k] + x[c + k]) + (x[d + k] + x[e + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[b + k] - x[c + k]) + two * (x[d + k] - x[e + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[b + k] + x[c + k]) + four * (x[d + k] + x[e + k])
    to += apart
    for k in range(length):
        out[to + k] = (x[b + k] - x[c + k]) + eight * (x[d + k] - x[e + k]) + x[f + k]
