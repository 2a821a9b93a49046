"""Deformable attention, whose sampling (Deformable DETR §4.1, eq. 3) takes most of its time and memory.

A CPU (:mod:`.cpu_sampling`) and a CUDA device (:mod:`.gpu_sampling`) have kernels for it that are several times faster
and never store a sample; other devices keep Transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from siamese_detr.gpu import runs_kernels

from .functional import retype
from .kernels import has_kernel

STOCK = "MultiScaleDeformableAttention"
"""Transformers' class of the sampling, of which each family that has it (RT-DETR, LW-DETR, …) has an equal copy."""


class Sampling(nn.Module):
    """Takes the place of Transformers' `MultiScaleDeformableAttention`, which holds no weights either.

    Args:
        stock: the module replaced; it still computes where neither a CPU nor a kernel of ours does.
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
        """Weighted samples of every query.

        Args:
            value: (B, S, heads, C), the levels one after the other.
            spatial_shapes, level_start_index: `shapes` and the first token of each level, on the device.
            im2col_step: only for the stock module.
            shapes: (h, w) of each level.
            locations: (B, Q, heads, levels, points, 2) as (x, y), 0 to 1 across each level.
            weights: (B, Q, heads, levels, points).

        Returns:
            (B, Q, heads * C), in the precision of `value`.
        """
        if runs_kernels(value) and not has_kernel(self.stock):
            from . import gpu_sampling

            return gpu_sampling.sample(value, locations, weights, spatial_shapes, level_start_index)
        if value.device.type != "cpu":
            return self.stock(value, spatial_shapes, shapes, level_start_index, locations, weights, im2col_step)
        from . import cpu_sampling  # Numba takes a moment to import

        return cpu_sampling.sample(value, locations, weights, shapes)


class DeformableAttention(DeformableDetrMultiscaleDeformableAttention):
    """Transformers' module, which it is again elsewhere, on a CPU around reference points (not boxes).

    There it adds offsets in cells to positions in cells, where the stock one scales both to the levels' sizes and back.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        position_embeddings: Tensor | None = None,
        reference_points: Any = None,
        spatial_shapes: Any = None,
        spatial_shapes_list: Any = None,
        level_start_index: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """See the stock module."""
        if hidden_states.device.type != "cpu" or reference_points.shape[-1] != 2:
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                position_embeddings,
                reference_points,
                spatial_shapes,
                spatial_shapes_list,
                level_start_index,
                **options,
            )
        queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        points = (*queries.shape[:2], self.n_heads, self.n_levels, self.n_points)
        weights = self.attention_weights(queries).view(*points[:3], -1).softmax(-1).view(points)
        offsets = self.sampling_offsets(queries).view(*points, 2)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))
        from . import cpu_sampling  # Numba takes a moment to import

        sampled = cpu_sampling.sample(value, offsets, weights, spatial_shapes_list, reference_points, attention_mask)
        return self.output_proj(sampled), weights


def install(model: nn.Module) -> bool:
    """Put :class:`Sampling` in the place of every stock sampling module; whether there was one. Let Deformable
    DETR's attention compute as :class:`DeformableAttention`."""
    retype(model, DeformableDetrMultiscaleDeformableAttention, DeformableAttention)
    return _replace(model, lambda module: type(module).__name__ == STOCK, Sampling)


def uninstall(model: nn.Module) -> bool:
    """Put the stock modules back."""
    retype(model, DeformableAttention, DeformableDetrMultiscaleDeformableAttention)
    return _replace(model, lambda module: isinstance(module, Sampling), lambda module: module.stock)


def _replace(model: nn.Module, old: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> bool:
    found = [
        (parent, name)
        for parent in model.modules()
        if not isinstance(parent, Sampling)
        for name, child in parent.named_children()
        if old(child)
    ]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))
    return bool(found)
