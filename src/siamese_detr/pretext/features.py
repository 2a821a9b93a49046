"""What a pre-training step reads from the frozen backbone, and how regions are pooled from it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from siamese_detr.detection.boxes import normalise_boxes
from siamese_detr.detectors.functional import full_precision
from siamese_detr.errors import UserError

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import DetectorAdapter
    from siamese_detr.views.batch import ViewInputs


@dataclass
class FrozenFeatures:
    """Everything a pretext task needs of a batch; none of it carries gradient, so it may be computed once and stored.

    Args:
        maps: backbone levels (V*B, C, h, w), view-major.
        pixel_mask: bool (V*B, H, W), True = picture, False = padding.
        sizes: (V*B, 2) un-padded (height, width) in pixels.
        boxes: (V, B, P, 4) regions, xyxy in pixels of each view; row p is the same region in every view. A row without
            area in any view is padding (images with fewer regions than others): it is never matched and weighs nothing.
        query_boxes: (V, B, P, 4) the jittered boxes from which the queries' features are pooled.
        crop_features: (V, B, P, C) pooled features of the regions' crops, levels concatenated; None if there are no
            crops.
    """

    maps: list[Tensor]
    pixel_mask: Tensor
    sizes: Tensor
    boxes: Tensor
    query_boxes: Tensor
    crop_features: Tensor | None = None

    @property
    def views(self) -> int:
        """V, the number of views of an image."""
        return self.boxes.shape[0]

    @property
    def valid(self) -> Tensor:
        """bool (V, B, P): True where the region has an area in every view."""
        return (self.boxes[..., 2:] > self.boxes[..., :2]).all(-1).all(0, keepdim=True).expand(self.boxes.shape[:3])

    @property
    def targets(self) -> Tensor:
        """(V, B, P, 4) boxes as the detector predicts them: cxcywh, normalised by the un-padded view."""
        return normalise_boxes(self.boxes, self.sizes.unflatten(0, self.boxes.shape[:2]))

    def crops(self) -> Tensor:
        """The crop features.

        Raises:
            UserError: there are none.
        """
        if self.crop_features is None:
            raise UserError("this pretext task needs the features of the regions' crops: prepare the batch with crops")
        return self.crop_features

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FrozenFeatures:
        """The same on another device."""

        def move(x: object) -> object:
            if isinstance(x, list):
                return [move(y) for y in x]
            return x.to(device, non_blocking=non_blocking) if isinstance(x, Tensor) else x

        return FrozenFeatures(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@torch.no_grad()
def freeze(detector: DetectorAdapter, inputs: ViewInputs, crops: bool) -> FrozenFeatures:
    """Run the frozen backbone once over all views and, if ``crops``, once over all crops.

    Raises:
        UserError: crops are wanted and ``inputs`` has none.
    """
    crop_features = None
    if crops:
        if inputs.crops is None:
            raise UserError("this pretext task needs the regions' crops: prepare the batch with crops")
        levels = detector.features(inputs.crops, None)
        pooled = torch.cat([full_precision(level).mean((2, 3)) for level in levels], dim=-1)
        crop_features = pooled.unflatten(0, inputs.boxes.shape[:3])
    return FrozenFeatures(
        maps=list(detector.features(inputs.pixel_values, inputs.pixel_mask)),
        pixel_mask=inputs.pixel_mask,
        sizes=inputs.sizes,
        boxes=inputs.boxes,
        query_boxes=inputs.query_boxes,
        crop_features=crop_features,
    )


@torch.no_grad()
def pool_regions(maps: list[Tensor], boxes: Tensor, strides: list[int], sizes: Tensor | None = None) -> Tensor:
    """z, the features of regions: the mean of RoIAlign (7×7, no half-pixel shift) of every level, concatenated (§3.1).

    RoIAlign's samples form a regular grid, so their mean is a product of one weight per row and one per column of the
    map: two small matrix products replace 49 bins of samples.

    Args:
        maps: levels (V*B, C, h, w).
        boxes: (V, B, P, 4) xyxy in pixels, inside the view.
        strides: pixels per cell of each level.
        sizes: (V*B, 2) un-padded (height, width). If given, samples between the last cell of the picture and the first
            of the padding take the former's value; else padding leaks in (as in the paper's code).

    Returns:
        (V, B, P, sum of C), in the precision of the maps.
    """
    corners = full_precision(boxes).flatten(0, 1)
    levels = []
    for level, stride in zip(maps, strides, strict=True):
        weights = []
        for axis in (0, 1):  # rows, columns
            low, high = corners[..., 1 - axis] / stride, corners[..., 3 - axis] / stride
            cells = level.shape[2 + axis]
            last = None if sizes is None else (sizes[:, axis] + stride - 1).div(stride, rounding_mode="floor") - 1
            weights.append(_sample_weights(low, high, cells, last))
        rows, columns = weights
        grid = (rows.unsqueeze(-1) * columns.unsqueeze(-2)).flatten(-2).to(level.dtype)
        with torch.autocast(level.device.type, enabled=False):
            levels.append(grid @ level.flatten(2).transpose(1, 2))
    return torch.cat(levels, dim=-1).unflatten(0, boxes.shape[:2])


def _sample_weights(low: Tensor, high: Tensor, cells: int, last: Tensor | None, bins: int = 7) -> Tensor:
    """Mean bilinear weight (N, P, cells) of RoIAlign's samples along one axis of regions [low, high] (N, P), in cells.

    ``last`` (N,) is the last cell samples may touch (the map's last one if None). There are ceil(length / bins) samples
    per bin, and a region is at least one cell long.
    """
    length = (high - low).clamp(min=1)
    per_bin = (length / bins).ceil()
    samples = bins * per_bin
    index = torch.arange(bins * -(-cells // bins), device=low.device)
    places = low.unsqueeze(-1) + (index + 0.5) * (length / samples).unsqueeze(-1)
    share = (index < samples.unsqueeze(-1)) / samples.unsqueeze(-1)
    if last is None:  # RoIAlign lets samples beyond the map count as zeros: regions below one cell at its edge
        share = share * (places <= cells)
        places = places.clamp(min=0, max=cells - 1)
    else:
        places = places.clamp(min=0).minimum(last.view(-1, 1, 1).to(places.dtype))
    hat = 1 - (places.unsqueeze(-1) - torch.arange(cells, device=low.device)).abs()
    return (share.unsqueeze(-2) @ hat.clamp_(min=0)).squeeze(-2)


def check_queries(num_queries: int, regions: int) -> None:
    """Raise UserError if there are fewer queries than regions."""
    if num_queries < regions:
        raise UserError(
            f"too few queries for the number of regions: {num_queries} queries, {regions} regions per image; "
            f"use a detector with at least {regions} queries or lower the number of regions"
        )


def region_of_query(num_queries: int, regions: int, device: torch.device | None = None) -> Tensor:
    """int64 (Q,): the region each query carries. Regions are repeated in a row, each Q/P times (rounded down or up).

    Raises:
        UserError: fewer queries than regions.
    """
    check_queries(num_queries, regions)
    return torch.arange(num_queries, device=device) * regions // num_queries
