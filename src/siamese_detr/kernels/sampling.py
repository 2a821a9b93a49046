"""The sampling of deformable attention (Deformable DETR §4.1, eq. 3), as ``siamese_detr::deformable_sample``.

Its reference is Transformers' own module, whose place :class:`Sampling` takes. The kernels are registered by the
modules ``cpu_sampling`` and ``gpu_sampling``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAME = "siamese_detr::deformable_sample"
BACKWARD = f"{NAME}_backward"
torch.library.define(NAME, "(Tensor value, Tensor locations, Tensor weights, SymInt[] sizes) -> Tensor")
torch.library.define(
    BACKWARD,
    "(Tensor gradient, Tensor value, Tensor locations, Tensor weights, SymInt[] sizes) -> (Tensor, Tensor, Tensor)",
)


def deformable_sample(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    """The weighted sum of every query's samples.

    Args:
        value: (B, S, heads, C), the levels one after the other.
        locations: (B, Q, heads, levels, points, 2) as (x, y), 0 to 1 across each level; outside are zeros.
        weights: (B, Q, heads, levels, points).
        sizes: height and width of each level, one after the other; the products sum to S.

    Returns:
        (B, Q, heads * C) in the precision of ``value``; computed in at least single precision.

    Raises:
        ValueError: the shapes do not belong together.
    """
    return torch.ops.siamese_detr.deformable_sample(value, locations, weights, sizes)


class Sampling(nn.Module):
    """Takes the place of Transformers' ``MultiScaleDeformableAttention``, which holds no weights either.

    Args:
        stock: the module replaced.
    """

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(
        self,
        value: Tensor,
        spatial_shapes: Tensor,
        shapes: list[tuple[int, int]],
        level_start_index: Tensor,
        locations: Tensor,
        weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """See ``deformable_sample``; ``shapes`` holds (h, w) of each level."""
        return deformable_sample(value, locations, weights, [side for shape in shapes for side in shape])


def check_shapes(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> None:
    """Raise ValueError unless the shapes are as :func:`deformable_sample` asks for: kernels do not look."""
    batch, _, heads, levels, _ = weights.shape
    cells = sum(height * width for height, width in pairs(sizes))
    fits = value.shape[:3] == (batch, cells, heads) and locations.shape == (*weights.shape, 2)
    if not fits or len(sizes) != 2 * levels:
        shapes = [tuple(x.shape) for x in (value, locations, weights)]
        raise ValueError(f"sampling from maps of {list(sizes)}: shapes that do not belong together: {shapes}")


def pairs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(height, width) of each level."""
    return list(zip(sizes[::2], sizes[1::2], strict=True))


@torch.library.register_fake(NAME)
def _(value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]) -> Tensor:
    return value.new_empty(*weights.shape[:2], value.shape[2] * value.shape[3])


@torch.library.register_fake(BACKWARD)
def _(
    gradient: Tensor, value: Tensor, locations: Tensor, weights: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(value), torch.empty_like(locations), torch.empty_like(weights)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.siamese_detr.deformable_sample_backward(gradient, *ctx.saved_tensors, ctx.sizes), None


torch.library.register_autograd(NAME, _gradients, setup_context=_keep_inputs)
