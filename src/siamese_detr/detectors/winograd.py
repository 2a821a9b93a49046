"""Convolutions of 3x3 by Winograd's minimal filtering, F(4x4, 3x3): 36 multiplications where the plain sums take 144.

Lavin & Gray, Fast Algorithms for Convolutional Neural Networks, CVPR 2016: with input tiles ``d`` of 6x6 that overlap
by two, and filters ``g``, ``Y = A' [(G g G') * (B' d B)] A`` are tiles of 4x4 results. The product * is summed over
channels, so all tiles and channels make 36 matrix products. The matrices are those of the points 0, 1, -1, 2, -2 and
infinity. The function is the same; its rounding error in float32 is some 5 times that of the plain sums, and would be
too large in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = range(128, 257)
"""With fewer, the transforms cost what the products save; with more, the filters, four times as large as the plain
ones, do, and the memory they take."""

TILES = 16
"""Fewer do not pay for reading the filters."""

SAVING = 2.6
"""So many times fewer products pay for the transforms. In small maps, tiles reach over the border, and the plain sums
leave out the zeros around."""

G = torch.tensor([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64) / 24

A = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
"""A transposed."""

RESULTS = torch.kron(A, A)
"""(16, 36): ``A' M A`` with the rows of M one after the other."""

TO_ALL = 7
"""The column of ``RESULTS`` that is all ones: what is added there is added to every result."""


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
    """Whether an input of ``shape`` (B, C, H, W) is large enough."""
    plain = (3 * shape[2] - 2) * (3 * shape[3] - 2)
    count = math.prod(tiles(shape))
    return shape[0] * count >= TILES and plain >= SAVING * 36 * count


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
    (batch, _, height, width), (down, across), channels = x.shape, tiles(x.shape), filters.shape[-1]
    products = torch.bmm(transform_input(x), filters)
    if bias is not None:
        products[TO_ALL] += bias
    results = RESULTS.to(x.dtype) @ products.flatten(1)
    results = results.view(4, 4, batch, down, across, channels).permute(2, 3, 0, 4, 1, 5)
    out = x.new_empty(batch, down, 4, across, 4, channels)
    if relu:
        torch.clamp_min(results, 0, out=out)
    else:
        out.copy_(results)
    return out.view(batch, 4 * down, 4 * across, channels)[:, :height, :width].contiguous().permute(0, 3, 1, 2)


def transform_input(x: Tensor) -> Tensor:
    """``B' d B`` of all tiles of ``x`` (B, C, H, W) with zeros around it: (36, B * down * across, C)."""
    (batch, channels, height, width), (down, across) = x.shape, tiles(x.shape)
    padded = x.new_zeros(batch, 4 * down + 2, 4 * across + 2, channels)
    padded[:, 1 : height + 1, 1 : width + 1] = x.permute(0, 2, 3, 1)
    rows = x.new_empty(6, batch, down, 4 * across + 2, channels)
    transform_line([padded[:, n : n + 4 * down - 3 : 4] for n in range(6)], rows)
    both = x.new_empty(6, 6, batch, down, across, channels)
    transform_line([rows[:, :, :, n : n + 4 * across - 3 : 4] for n in range(6)], both.transpose(0, 1))
    return both.view(36, -1, channels)


def transform_line(d: Sequence[Tensor], out: Tensor) -> None:
    """``B'`` times the six values ``d`` of every tile in one direction, into ``out``."""
    even, odd = d[4] - d[2], d[3] - d[1]
    torch.add(even, d[0] - d[2], alpha=4, out=out[0])
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d[5] - d[3], odd, alpha=4, out=out[5])
    torch.sub(d[4], d[2], alpha=4, out=even)
    torch.sub(d[3], d[1], alpha=4, out=odd)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])
