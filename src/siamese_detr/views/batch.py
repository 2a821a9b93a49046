"""The batches between views and pretext task: uint8 views from the data workers, and the detector's inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma")
"""Columns of ``ViewBatch["photometric"]``. Factors are 1 and hue is 0 where the colour jitter is not applied; ``order``
is the index of the permutation of the first four, -1 where none is applied; ``gray`` is 0 or 1; ``sigma`` is the
blur's standard deviation in pixels, 0 for none."""


class ViewBatch(TypedDict):
    """A collated batch of B images with V views of P regions (V = 2 for Siamese, 1 for UP-DETR and DETReg).

    Attributes:
        images: uint8 (B, V, 3, H, W), zero-padded right and bottom.
        sizes: int64 (B, V, 2), valid (height, width).
        boxes: float32 (B, V, P, 4), xyxy pixels of the view; row p is the same region in every view. Loss targets.
        query_boxes: float32 (B, V, P, 4), the same with jittered edges; only for RoIAlign of the queries.
        photometric: float32 (B, V, 1 + P, K), columns :data:`PHOTOMETRIC`; row 0 for the view, row 1 + p for crop p.
        photometric_host: the same as a NumPy array. It stays on the host when the tensors move to the device, so that
            preparing the augmentation does not wait for the device.
        padded: int64 (B,), number of padding regions, always the last ones: jittered copies of the others, or boxes
            without area (no targets) for DETReg.
        index: int64 (B,), rows of the store.
        skipped: (path, reason) of images that could not be read. They are left out of the batch, never replaced.
    """

    images: torch.Tensor
    sizes: torch.Tensor
    boxes: torch.Tensor
    query_boxes: torch.Tensor
    photometric: torch.Tensor
    photometric_host: np.ndarray
    padded: torch.Tensor
    index: torch.Tensor
    skipped: list[tuple[str, str]]


@dataclass(frozen=True)
class ViewInputs:
    """A batch ready for the detector. "View-major": all first views, then all second ones.

    Attributes:
        pixel_values: float (V * B, 3, H, W), normalised, exactly 0 under the padding.
        pixel_mask: bool (V * B, H, W), True = valid.
        sizes: int64 (V * B, 2), valid (height, width).
        boxes: float32 (V, B, P, 4), xyxy pixels.
        query_boxes: float32 (V, B, P, 4), jittered.
        crops: float (V * B * P, 3, S, S), normalised, or None if not wanted.
    """

    pixel_values: torch.Tensor
    pixel_mask: torch.Tensor
    sizes: torch.Tensor
    boxes: torch.Tensor
    query_boxes: torch.Tensor
    crops: torch.Tensor | None


def valid_mask(sizes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bool (B, height, width): True inside the valid area, of ``sizes`` (B, 2) = (height, width), at the upper left."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
