"""Max pooling of channels-last maps on a GPU: PyTorch's also finds where the maxima were, which takes longer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, fx, nn

VALUES = 1024
"""Results of a program."""


class MaxPool(nn.Module):
    """A stock pooling layer without padding values, dilation or indices, on maps without gradient.

    Args:
        stock: the layer it takes the place of.
    """

    def __init__(self, stock: nn.MaxPool2d) -> None:
        super().__init__()
        self.geometry = tuple(_one(x) for x in (stock.kernel_size, stock.stride, stock.padding))

    @staticmethod
    def suits(module: nn.Module | None) -> bool:
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
    out = x.new_empty((count, channels, height, width)).contiguous(memory_format=torch.channels_last)
    if out.numel():
        grid = triton.cdiv(height * width * channels, VALUES), count
        with torch.cuda.device_of(x):
            _pool[grid](x, out, *extent, height, width, channels, kernel, stride, padding, VALUES)
    return out


def replace_pools(network: fx.GraphModule) -> None:
    """Put :class:`MaxPool` for stock layers."""
    for name, module in list(network.named_modules()):
        if MaxPool.suits(module):
            network.set_submodule(name, MaxPool(module))


def _one(size: int | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


@triton.jit
def _pool(
    x, out, tall, wide, height, width, channels,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    here = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    channel, column, row = here % channels, here // channels % width, here // channels // width
    exists = row < height
    x += image * tall * wide * channels
    best = tl.full((VALUES,), -float("inf"), x.dtype.element_ty)
    for down in tl.static_range(KERNEL):
        for right in tl.static_range(KERNEL):
            y, z = row * STRIDE - PADDING + down, column * STRIDE - PADDING + right
            inside = exists & (y >= 0) & (y < tall) & (z >= 0) & (z < wide)
            value = tl.load(x + (y * wide + z) * channels + channel, mask=inside, other=-float("inf"))
            best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + image * height * width * channels + here, best, mask=exists)
