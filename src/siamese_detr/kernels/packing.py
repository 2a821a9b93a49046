"""Encoding a padded batch's tokens without its padding, for encoders in which no token reads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Which tokens of a padded batch lie inside their images.

    Args:
        padded: B and L of the batch's tokens.
        index: (N,) indices of those inside among all B * L.
        shapes: for each image, (h, w) of what its levels hold of it; the products sum to N.
    """

    padded: tuple[int, int]
    index: Tensor
    shapes: list[list[tuple[int, int]]]

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (1, N, ...), the images one after the other."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """(1, N, ...) -> (B, L, ...), zeros in the padding."""
        batch, length = self.padded
        zeros = packed.new_zeros(batch * length, *packed.shape[2:])
        return zeros.index_copy_(0, self.index, packed[0]).unflatten(0, self.padded)


def find_packing(masks: list[Tensor]) -> Packing | None:
    """How to pack what these masks say is inside; None where there is no padding, or nothing else, or where padding is
    elsewhere than on the right and at the bottom.

    Args:
        masks: (B, h, w) boolean on a CPU for each level, True = inside the image.
    """
    sizes = []
    for mask in masks:
        level = mask.numpy()
        _, rows, columns = level.shape
        heights, widths = level[:, :, :1].sum(1), level[:, 0].sum(1, keepdims=True)  # (B, 1) each
        expected = (np.arange(rows) < heights)[:, :, None] & (np.arange(columns) < widths)[:, None]
        if not np.array_equal(level, expected):
            return None
        sizes.append(np.concatenate((heights, widths), 1))
    inside = torch.cat([mask.flatten(1) for mask in masks], 1).numpy()
    if inside.all() or not inside.any():
        return None
    shapes = [[(int(height), int(width)) for height, width in image] for image in np.stack(sizes, 1)]
    return Packing(inside.shape, torch.from_numpy(np.flatnonzero(inside)), shapes)
