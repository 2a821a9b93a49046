"""A frozen network's first layers on a GPU: pixels arranged for tensor cores, and max pooling.

PyTorch's pooling also finds where the maxima were, which takes four times as long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, fx, nn

VALUES = 1024
"""Results of a program."""


def arrange(x: Tensor, first: int, size: tuple[int, int], channels: int) -> Tensor:
    """The 2x2 pixels of every block as the channels of one.

    Args:
        x: (B, C, H, W).
        first: number of the first block, which may be negative: outside the images are zeros.
        size: (height, width) in blocks.
        channels: 4 C, those of a row of pixels after the other, and zeros.

    Returns:
        (B, channels, height, width), channels last.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    out = x.new_empty(len(x), *size, channels)
    if out.numel():
        grid = (triton.cdiv(out[0].numel(), VALUES) * len(x),)
        with torch.cuda.device_of(x):
            _arrange[grid](x, out, *x.shape[1:], *size, first, channels, VALUES)
    return out.permute(0, 3, 1, 2)


class MaxPool(nn.Module):
    """A stock pooling layer of equal sides, without dilation, indices or ceil mode, on maps without gradient.

    Args:
        stock: the layer it takes the place of.
    """

    def __init__(self, stock: nn.MaxPool2d) -> None:
        super().__init__()
        self.geometry = tuple(_one(x) for x in (stock.kernel_size, stock.stride, stock.padding))

    @staticmethod
    def suits(module: nn.Module) -> bool:
        """Whether it can take the place of ``module``."""
        if type(module) is not nn.MaxPool2d or module.return_indices or module.ceil_mode:
            return False
        known = (module.kernel_size, module.stride, module.padding, module.dilation)
        return all(isinstance(x, int) or len({*x}) == 1 for x in known) and _one(module.dilation) == 1

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w)."""
        return pool(x, *self.geometry)


def pool(x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """As ``nn.functional.max_pool2d``; channels last."""
    x = x.contiguous(memory_format=torch.channels_last)
    count, channels, *extent = x.shape
    height, width = ((side + 2 * padding - kernel) // stride + 1 for side in extent)
    out = x.new_empty(count, height, width, channels)
    if out.numel():
        grid = (triton.cdiv(height * width * channels, VALUES) * count,)
        with torch.cuda.device_of(x):
            _pool[grid](x, out, channels, *extent, height, width, kernel, stride, padding, VALUES)
    return out.permute(0, 3, 1, 2)


def replace_pools(network: fx.GraphModule) -> None:
    """Put :class:`MaxPool` for stock layers."""
    for name, module in list(network.named_modules()):
        if MaxPool.suits(module):
            network.set_submodule(name, MaxPool(module))


def _one(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


@triton.jit
def _part(values, VALUES: tl.constexpr):
    """Image of a program and its results, of ``values``. All programs are in the grid's first direction: CUDA allows
    few in the others."""
    parts = tl.cdiv(values, VALUES)
    return (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * VALUES + tl.arange(0, VALUES)


@triton.jit
def _arrange(x, out, colours, tall, wide, height, width, first, CHANNELS: tl.constexpr, VALUES: tl.constexpr):
    values = height * width * CHANNELS
    image, here = _part(values, VALUES)
    channel, column, row = here % CHANNELS, here // CHANNELS % width, here // CHANNELS // width
    pixel, colour = channel // colours, channel % colours
    y, z = 2 * (row + first) + pixel // 2, 2 * (column + first) + pixel % 2
    inside = (here < values) & (pixel < 4) & (y >= 0) & (y < tall) & (z >= 0) & (z < wide)
    value = tl.load(x + image * tall * wide * colours + (y * wide + z) * colours + colour, mask=inside, other=0.0)
    tl.store(out + image * values + here, value, mask=here < values)


@triton.jit
def _pool(
    x, out, channels, tall, wide, height, width,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    values = height * width * channels
    image, here = _part(values, VALUES)
    channel, column, row = here % channels, here // channels % width, here // channels // width
    x += image * tall * wide * channels
    best = tl.full((VALUES,), -float("inf"), x.dtype.element_ty)
    for down in tl.static_range(KERNEL):
        for right in tl.static_range(KERNEL):
            y, z = row * STRIDE - PADDING + down, column * STRIDE - PADDING + right
            inside = (here < values) & (y >= 0) & (y < tall) & (z >= 0) & (z < wide)
            value = tl.load(x + (y * wide + z) * channels + channel, mask=inside, other=-float("inf"))
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + image * values + here, best, mask=here < values)
