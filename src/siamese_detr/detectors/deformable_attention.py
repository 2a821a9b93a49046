"""The sampling of deformable attention (Deformable DETR §4.1, eq. 3), several times faster on a CPU and without the
samples in memory.

Every query sums, per head, `levels * points` bilinear samples of its value map, that is four times as many rows of a
table with one weight each. So the sum is one "embedding bag": no sample is ever stored. What the backward pass needs is
computed again from the inputs, and the gradient of the values is a product with the transposed sparse matrix of those
weights. A CUDA device has kernels for it (:mod:`.gpu_sampling`), other devices keep Transformers' own code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import torch
from scipy.sparse import csc_array
from torch import Tensor, nn
from torch.nn.functional import embedding_bag
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from siamese_detr.gpu import runs_kernels

from .functional import retype
from .kernels import has_kernel

STOCK = "MultiScaleDeformableAttention"
"""Transformers' class of the sampling, of which each family that has it (RT-DETR, LW-DETR, …) has an equal copy."""
BORDER = 2
"""Rows and columns of zeros around each level: a point outside the map reads zeros, like all its neighbours."""


class BagSampling(nn.Module):
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
        return sample(value, locations, weights, shapes)


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
        sampled = sample(value, offsets, weights, spatial_shapes_list, reference_points, attention_mask)
        return self.output_proj(sampled), weights


@torch.compiler.disable
def sample(
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    shapes: list[tuple[int, int]],
    reference: Tensor | None = None,
    shown: Tensor | None = None,
) -> Tensor:
    """See :meth:`BagSampling.forward`.

    Args:
        value, weights, shapes: as there.
        locations: as there; with `reference`, their distances from it in cells of their level.
        reference: (B, Q, levels, 2), 0 to 1 across each level.
        shown: (B, S), False where zeros are to be read for the values.
    """
    return _Sample.apply(value, locations, weights, tuple(shapes), reference, shown)


class _Sample(torch.autograd.Function):
    """Image by image: what is needed besides the inputs and the result stays small."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        shapes: tuple,
        reference: Tensor | None,
        shown: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights, reference, shown)
        ctx.shapes = shapes
        grid = _Grid(value, locations, shapes, absolute=reference is None)
        out = value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])
        for image, (v, at, weight, near, show) in enumerate(_images(value, locations, weights, reference, shown)):
            rows, right, down = grid.place(at, near)
            bags = grid.shares(weight, right, down)
            summed = embedding_bag(rows, grid.table(v, show), mode="sum", per_sample_weights=bags)
            out[image] = summed.view(out.shape[1:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights, reference, shown = ctx.saved_tensors
        grid = _Grid(value, locations, ctx.shapes, absolute=reference is None)
        to_value, to_locations, to_weights = (x.new_empty(x.shape) for x in (value, locations, weights))
        images = _images(value, locations, weights, reference, shown, gradient)
        for image, (v, at, weight, near, show, above) in enumerate(images):
            rows, right, down = grid.place(at, near)
            above = above.to(grid.dtype).reshape(len(rows), -1)
            if ctx.needs_input_grad[0]:
                grid.to_levels(grid.shares(weight, right, down), rows, above, show, to_value[image])
            corners = grid.corners(rows, grid.table(v, show), above)
            to_locations[image], to_weights[image] = grid.to_points(corners, weight, right, down, at.shape)
        to_reference = None
        if ctx.needs_input_grad[4]:
            sizes = torch.tensor([(width, height) for height, width in ctx.shapes])
            to_reference = to_locations.sum((2, 4)) * sizes
        return to_value if ctx.needs_input_grad[0] else None, to_locations, to_weights, None, to_reference, None


def _images(*batches: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """The parts of every image; None for what is not there."""
    return zip(*(repeat(None) if batch is None else batch for batch in batches), strict=False)


class _Grid:
    """Where points lie in the table of all levels, whose rows are (level, y, x, head), each of C channels.

    Everything about points has the shape (Q, heads * levels * points): long rows are what a CPU is fast with. So the
    levels' sizes are repeated to that length.
    """

    def __init__(
        self, value: Tensor, locations: Tensor, shapes: tuple[tuple[int, int], ...], *, absolute: bool
    ) -> None:
        self.shapes, self.absolute = shapes, absolute
        self.heads, self.points = value.shape[2], locations.shape[4]
        self.dtype = torch.promote_types(value.dtype, torch.float32)
        starts, cells = [], 0
        for height, width in shapes:
            starts.append(cells + BORDER * (width + 2 * BORDER) + BORDER)
            cells += (height + 2 * BORDER) * (width + 2 * BORDER)
        self.rows = cells * self.heads
        self.width = self._per_point([width for _, width in shapes]).to(self.dtype)
        self.height = self._per_point([height for height, _ in shapes]).to(self.dtype)
        self.stride = self._per_point([(width + 2 * BORDER) * self.heads for _, width in shapes])
        head = torch.arange(self.heads, dtype=torch.int32).repeat_interleave(len(shapes) * self.points)
        self.last = self.rows - 1 - self.heads - self.stride
        self.origin = self._per_point([start * self.heads for start in starts]) + head

    def _per_point(self, per_level: list[int]) -> Tensor:
        return torch.tensor(per_level, dtype=torch.int32).repeat_interleave(self.points).repeat(self.heads)

    def table(self, value: Tensor, shown: Tensor | None) -> Tensor:
        """(S, heads, C) with borders of zeros around each level: (rows, C)."""
        table = value.new_zeros(self.rows, value.shape[2], dtype=self.dtype)
        for level, inner, show in self._levels(value, table, shown):
            _copy(level, show, inner)
        return table

    def _levels(self, value: Tensor, table: Tensor, shown: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """What belongs together in (S, heads, C), a table, and (S,): level by level (h, w, heads * C) twice, and
        (h, w, 1) or None."""
        values, cells = value.flatten(1), table.view(-1, self.heads * value.shape[2])
        begin = first = 0
        for height, width in self.shapes:
            wide, end = width + 2 * BORDER, begin + height * width
            last = first + (height + 2 * BORDER) * wide
            yield (
                values[begin:end].view(height, width, -1),
                cells[first:last].view(-1, wide, cells.shape[1])[BORDER:-BORDER, BORDER:-BORDER],
                None if shown is None else shown[begin:end].to(self.dtype).view(height, width, 1),
            )
            begin, first = end, last

    def place(self, locations: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(Q, heads, levels, points, 2) -> rows (Q * heads, 4 * levels * points) of the four neighbours, and how far
        the points lie to the right of and below the first one, in cells.
        """
        x, y = locations.to(self.dtype).reshape(len(locations), -1, 2).unbind(-1)
        if reference is None:
            x, y = x * self.width, y * self.height
        else:
            known = reference.to(self.dtype).repeat_interleave(self.points, 1).repeat(1, self.heads, 1)
            x, y = torch.addcmul(x, known[..., 0], self.width), torch.addcmul(y, known[..., 1], self.height)
        right, column = _split(x, self.width)
        down, row = _split(y, self.height)
        first = row.mul_(self.stride).add_(column, alpha=self.heads).add_(self.origin)
        rows = first.new_empty(self._bags(first))
        rows[:, 0] = torch.minimum(first.clamp_(min=0), self.last).view(len(rows), -1)  # NaN gives any number
        torch.add(rows[:, 0], self.heads, out=rows[:, 1])
        torch.add(rows[:, 0:2], self.stride[: rows.shape[2]], out=rows[:, 2:4])
        return rows.flatten(1), right, down

    def shares(self, weights: Tensor, right: Tensor, down: Tensor) -> Tensor:
        """The weights of those rows."""
        weights = weights.to(self.dtype).reshape(right.shape)
        below = weights * down
        above = weights - below
        bags = right.new_empty(self._bags(right))
        above, below, right = (x.view(len(bags), -1) for x in (above, below, right))
        for left, here in ((0, above), (2, below)):
            share = torch.mul(here, right, out=bags[:, left + 1])
            torch.sub(here, share, out=bags[:, left])
        return bags.flatten(1)

    def _bags(self, points: Tensor) -> tuple[int, int, int]:
        """Shape of a number per neighbour of these points: queries and heads, neighbours, levels and points."""
        length = len(self.shapes) * self.points
        return points.numel() // length, 4, length

    def corners(self, rows: Tensor, table: Tensor, gradient: Tensor) -> list[Tensor]:
        """What each neighbour's value contributes, were its weight one: four (Q, heads * levels * points)."""
        ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
        wanted = torch.zeros(rows.numel(), dtype=self.dtype)
        with warnings.catch_warnings():  # sparse tensors announce that they are young
            warnings.simplefilter("ignore", UserWarning)
            size = (len(rows), len(table))
            pattern = torch.sparse_csr_tensor(ends, rows.flatten(), wanted, size, check_invariants=False)
            # Into the pattern itself, which else is copied first.
            products = torch.sparse.sampled_addmm(pattern, gradient, table.t(), beta=0, out=pattern).values()
        return [part.reshape(-1, len(self.width)) for part in products.view(len(rows), 4, -1).unbind(1)]

    def to_points(
        self, corners: list[Tensor], weights: Tensor, right: Tensor, down: Tensor, shape: torch.Size
    ) -> tuple[Tensor, Tensor]:
        """Gradients of locations and weights."""
        top_left, top_right, bottom_left, bottom_right = corners
        top, bottom = top_right - top_left, bottom_right - bottom_left
        above = top_left.addcmul_(right, top)
        vertical = bottom_left.addcmul_(right, bottom).sub_(above)
        horizontal = top.addcmul_(down, bottom.sub_(top))
        weights = weights.to(self.dtype).reshape(right.shape)
        to_cells = horizontal.mul_(weights), vertical * weights
        if self.absolute:
            to_cells = to_cells[0].mul_(self.width), to_cells[1].mul_(self.height)
        return torch.stack(to_cells, -1).view(shape), above.addcmul_(down, vertical).view(shape[:-1])

    def to_levels(self, shares: Tensor, rows: Tensor, gradient: Tensor, shown: Tensor | None, out: Tensor) -> None:
        """Gradient of the values, into ``out`` (S, heads, C)."""
        ends = torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)
        parts = (shares.flatten().numpy(), rows.flatten().numpy(), ends.numpy())
        matrix = csc_array(parts, shape=(self.rows, len(rows)))
        table = torch.from_numpy(matrix @ gradient.numpy())
        for level, inner, show in self._levels(out, table, shown):
            _copy(inner, show, level)


def _copy(x: Tensor, shown: Tensor | None, out: Tensor) -> None:
    """Fill ``out`` with ``x``, and with zeros where it is not shown."""
    if shown is None:
        out.copy_(x)
    else:
        torch.mul(x, shown, out=out)


def _split(place: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Positions in cells, overwritten -> (distance behind the centre before, its int32 index), kept near by."""
    place = torch.minimum(place.sub_(0.5).clamp_(min=-BORDER), cells)
    before = place.floor()
    return place.sub_(before), before.to(torch.int32)


def install(model: nn.Module) -> bool:
    """Put :class:`BagSampling` in the place of every stock sampling module; whether there was one. Let Deformable
    DETR's attention compute as :class:`DeformableAttention`."""
    retype(model, DeformableDetrMultiscaleDeformableAttention, DeformableAttention)
    return _replace(model, lambda module: type(module).__name__ == STOCK, BagSampling)


def uninstall(model: nn.Module) -> bool:
    """Put the stock modules back."""
    retype(model, DeformableAttention, DeformableDetrMultiscaleDeformableAttention)
    return _replace(model, lambda module: isinstance(module, BagSampling), lambda module: module.stock)


def _replace(model: nn.Module, old: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> bool:
    found = [
        (parent, name)
        for parent in model.modules()
        if not isinstance(parent, BagSampling)
        for name, child in parent.named_children()
        if old(child)
    ]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))
    return bool(found)
