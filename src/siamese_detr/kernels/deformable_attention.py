"""Deformable attention, whose sampling (Deformable DETR §4.1, eq. 3) takes most of its time and memory.

A CPU (:mod:`.cpu_sampling`) and a CUDA device (:mod:`.gpu_sampling`) have kernels for it that are several times faster
and never store a sample; other devices keep Transformers' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from siamese_detr.detectors.functional import product_dtype, retype
from siamese_detr.kernels.hub import has_kernel
from siamese_detr.kernels.linear import product
from siamese_detr.runtime.gpu import runs_kernels

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
            from siamese_detr.kernels import gpu_sampling

            return gpu_sampling.sample(value, locations, weights, spatial_shapes, level_start_index)
        if value.device.type != "cpu":
            if not torch.is_autocast_enabled(value.device.type):  # it takes the most precise of them
                locations, weights = locations.to(value.dtype), weights.to(value.dtype)
            return self.stock(value, spatial_shapes, shapes, level_start_index, locations, weights, im2col_step)
        from siamese_detr.kernels import cpu_sampling  # Numba takes a moment to import

        return cpu_sampling.sample(value, locations, weights, shapes)


class DeformableAttention(DeformableDetrMultiscaleDeformableAttention):
    """Transformers' module, which it still is on other devices than a CPU and a GPU, and around boxes instead of
    reference points.

    Where it is not, offsets in cells are added to positions in cells; the stock one scales both to the levels' sizes
    and back.
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
        sampling: Any = self.attn
        on_gpu = runs_kernels(hidden_states) and not has_kernel(sampling.stock)
        if not (on_gpu or hidden_states.device.type == "cpu") or reference_points.shape[-1] != 2:
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
        points = (*hidden_states.shape[:2], self.n_heads, self.n_levels, self.n_points)
        offsets, scores = project_sum(hidden_states, position_embeddings, self.sampling_offsets, self.attention_weights)
        offsets = offsets.view(*points, 2)
        weights = scores.view(*points[:3], -1).softmax(-1).view(points)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))
        inputs, around = (value, offsets, weights), (reference_points, attention_mask)
        if on_gpu:
            from siamese_detr.kernels import gpu_sampling

            sampled = gpu_sampling.sample(*inputs, spatial_shapes, level_start_index, *around)
        else:
            from siamese_detr.kernels import cpu_sampling  # Numba takes a moment to import

            sampled = cpu_sampling.sample(*inputs, spatial_shapes_list, *around)
        return self.output_proj(sampled), weights


def project_sum(x: Tensor, position: Tensor | None, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """What linear layers make of ``x + position``, a sum that a training on a CPU computes twice rather than keeps.

    Args:
        x: (..., D).
        position: of the same shape; None: zeros.
        layers: with biases, D -> H each.

    Returns:
        (..., H) of each.
    """
    if position is None or x.device.type != "cpu" or not layers[0].training or torch.compiler.is_compiling():
        queries = x if position is None else x + position
        return tuple(layer(queries) for layer in layers)
    parameters = [value.to(product_dtype(x)) for layer in layers for value in (layer.weight, layer.bias)]
    return _ProjectedSum.apply(x, position, *parameters)


class _ProjectedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, position: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        ctx.save_for_backward(x, position, *weights)
        queries = (x + position).to(weights[0].dtype)
        return tuple(product(queries, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, position, *weights = ctx.saved_tensors
        exact = x + position
        queries = exact.to(weights[0].dtype).flatten(0, -2)
        to_sum: Any = None
        to_parameters = []
        for gradient, weight in zip(gradients, weights, strict=True):
            above, part = gradient.flatten(0, -2), product(gradient, weight.t())
            to_sum = part.to(exact.dtype) if to_sum is None else to_sum.add_(part)
            to_parameters += [above.t() @ queries, above.sum(0)]
        return to_sum, to_sum, *to_parameters


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
