"""Convolutions of 3x3 by Winograd's minimal filtering, F(4x4, 3x3): 36 multiplications where the plain sums take 144.

Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016: with input tiles ``d`` of 6x6 that overlap
by two, and filters ``g``, ``Y = A' [(G g G') * (B' d B)] A`` are tiles of 4x4 results. The product * is summed over
channels, so all tiles and channels make 36 matrix products. The matrices are those of the points 0, 1, -1, 2, -2 and
infinity. The function is the same; its rounding error in float32 is some 5 times that of the plain sums, and would be
too large in bfloat16.

Numba compiles what transforms the input and the products, in some four seconds when they are first called.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import uint64
from torch import Tensor, nn

CHANNELS = range(128, 513)
"""With fewer, the transforms cost what the products save; with more, the filters, four times as large as the plain
ones, do, and the memory they take."""

TILES = 16
"""Fewer do not pay for reading the filters."""

SAVING = 2.6
"""So many times fewer products pay for the transforms. In small maps, tiles reach over the border, and the plain sums
leave out the zeros around."""

THREADS = 6
"""With more it does not pay: one thread computes the transforms, in an eighth to a quarter of the time that two need
for the plain sums. (Where two computed them, what Python and the caches cost took up what that saved.)"""

G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24


def suits(convolution: nn.Conv2d) -> bool:
    """Whether ``convolution`` can be computed so, and has as many channels as make it pay."""
    return (
        convolution.weight.dtype == torch.float32
        and (convolution.kernel_size, convolution.stride, convolution.dilation) == ((3, 3), (1, 1), (1, 1))
        and (convolution.padding, convolution.groups) == ((1, 1), 1)
        and convolution.in_channels in CHANNELS
        and convolution.out_channels in CHANNELS
    )


def pays(shape: Sequence[int]) -> bool:
    """Whether an input of ``shape`` (B, C, H, W) is large enough, with the threads there are."""
    plain = (3 * shape[2] - 2) * (3 * shape[3] - 2)
    count = math.prod(tiles(shape))
    large = shape[0] * count >= TILES and plain >= SAVING * 36 * count
    return large and torch.get_num_threads() <= THREADS


def tiles(shape: Sequence[int]) -> tuple[int, int]:
    """Tiles of 4x4 results below and beside each other."""
    return -(-shape[2] // 4), -(-shape[3] // 4)


def transform_filters(weight: Tensor) -> Tensor:
    """Filters (C_out, C_in, 3, 3) as matrices (36, C_in, C_out)."""
    return torch.einsum("ai,ocij,bj->abco", G, weight.double(), G).flatten(0, 1).to(weight.dtype).contiguous()


def convolve(x: Tensor, filters: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """A convolution with zeros around ``x``; without gradient.

    Args:
        x: (B, C_in, H, W), fastest where channels are last.
        filters: of :func:`transform_filters`.
        bias: (C_out,).
        relu: whether negative results become 0.

    Returns:
        (B, C_out, H, W), channels last.
    """
    (batch, channels, height, width), (down, across), outputs = x.shape, tiles(x.shape), filters.shape[-1]
    transformed = x.new_empty(36, batch * down * across, channels)
    _transform_input(x.permute(0, 2, 3, 1).contiguous().numpy(), transformed.numpy())
    products = torch.bmm(transformed, filters)
    bias = x.new_zeros(outputs) if bias is None else bias.view(outputs)  # what is compiled does not look
    out = x.new_empty(batch, height, width, outputs)
    _transform_products(products.numpy(), bias.numpy(), relu, out.numpy())
    return out.permute(0, 3, 1, 2)


# Sums may be reordered, as vectors need it, but what is no number stays so. Indices are unsigned: negative ones would
# count from the end, so that Numba tests every one.
_compiled: Any = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _transform_input(x, out):
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


@_compiled
def _transform_products(products, bias, relu, out):
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


@_compiled
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


@_compiled
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
