"""The batches between views and pretext task: uint8 views from the data workers, and what the detector sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from siamese_detr.views.photometric import augment, cut


class ViewBatch(TypedDict):
    """A collated batch of B images with V views of P regions (V = 2 for Siamese, 1 for UP-DETR and DETReg).

    Attributes:
        images: uint8 (B, V, 3, H, W), zero-padded right and bottom.
        sizes: int64 (B, V, 2), valid (height, width).
        boxes: float32 (B, V, P, 4), xyxy pixels of the view; row p is the same region in every view. Loss targets.
        query_boxes: float32 (B, V, P, 4), the same with jittered edges; only for RoIAlign of the queries.
        photometric: float32 (B, V, 1 + P, K), columns :data:`.photometric.PHOTOMETRIC`; row 0 for the view,
            row 1 + p for crop p. A NumPy array: it stays on the host when the tensors move to the device, so that
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
    photometric: np.ndarray
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


@torch.no_grad()
def prepare(batch: ViewBatch, mean: Sequence[float], std: Sequence[float], crop_size: int | None = 128) -> ViewInputs:
    """Augment and normalise a batch and cut its crops, on the device the batch is on.

    Crops are cut from the views before the augmentation, and each then gets its own (paper, section 3.1). What lies
    under the padding of a batch changes nothing.

    Args:
        batch: what :func:`siamese_detr.views.two_views.collate` gives, moved to the device.
        mean, std: of the backbone's normalisation, three each, for pixels in [0, 1].
        crop_size: side of the square crops, pixels; None or 0: no crops.
    """
    images = batch["images"].transpose(0, 1)  # (V, B, 3, H, W): view-major
    sizes = batch["sizes"].transpose(0, 1).flatten(0, 1)
    boxes = batch["boxes"].transpose(0, 1)
    parameters = torch.from_numpy(np.ascontiguousarray(batch["photometric"].swapaxes(0, 1)))  # (V, B, 1 + P, K)
    normal = (list(map(float, mean)), list(map(float, std)))
    flat, crops = images.flatten(0, 1), None
    if crop_size:
        crops = cut(flat, sizes, boxes.flatten(0, 1), crop_size)
        whole = sizes.new_full((len(crops), 2), crop_size)
        crops = augment(crops, parameters[:, :, 1:].flatten(0, 2), whole, *normal)
    return ViewInputs(
        pixel_values=augment(flat, parameters[:, :, 0].flatten(0, 1), sizes, *normal),
        pixel_mask=valid_mask(sizes, *images.shape[-2:]),
        sizes=sizes,
        boxes=boxes,
        query_boxes=batch["query_boxes"].transpose(0, 1),
        crops=crops,
    )


def valid_mask(sizes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """bool (B, height, width): True inside the valid area, of ``sizes`` (B, 2) = (height, width), at the upper left."""
    rows = torch.arange(height, device=sizes.device) < sizes[:, :1]
    columns = torch.arange(width, device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]
