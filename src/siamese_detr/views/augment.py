"""From a batch of uint8 views to what the detector sees: crops, photometric augmentation, normalisation, on the device.

Crops are cut from the views before the augmentation, each then gets its own (paper, section 3.1). What lies under the
padding of a batch changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from siamese_detr.views.batch import ViewBatch, ViewInputs, valid_mask
from siamese_detr.views.photometric import augment, cut

__all__ = ["ViewInputs", "prepare"]


@torch.no_grad()
def prepare(batch: ViewBatch, mean: Sequence[float], std: Sequence[float], crop_size: int | None = 128) -> ViewInputs:
    """Augment and normalise a batch and cut its crops, on the device the batch is on.

    Args:
        batch: what :func:`siamese_detr.views.two_views.collate` gives, moved to the device.
        mean, std: of the backbone's normalisation, three each, for pixels in [0, 1].
        crop_size: side of the square crops, pixels; None or 0: no crops.
    """
    images = batch["images"].transpose(0, 1)  # (V, B, 3, H, W): view-major
    sizes = batch["sizes"].transpose(0, 1).flatten(0, 1)
    boxes = batch["boxes"].transpose(0, 1)
    host = batch.get("photometric_host")
    if host is None:
        host = batch["photometric"].cpu().numpy()
    parameters = torch.from_numpy(np.ascontiguousarray(host.swapaxes(0, 1)))  # (V, B, 1 + P, K)
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
