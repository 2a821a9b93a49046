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
    from siamese_detr.kernels import cpu_winograd  # Numba takes a moment to import

    (batch, channels, height, width), (down, across), outputs = x.shape, tiles(x.shape), filters.shape[-1]
    transformed = x.new_empty(36, batch * down * across, channels)
    cpu_winograd.transform_input(x.permute(0, 2, 3, 1).contiguous().numpy(), transformed.numpy())
    products = torch.bmm(transformed, filters)
    bias = x.new_zeros(outputs) if bias is None else bias.view(outputs)  # what is compiled does not look
    out = x.new_empty(batch, height, width, outputs)
    cpu_winograd.transform_products(products.numpy(), bias.numpy(), relu, out.numpy())
    return out.permute(0, 3, 1, 2)
