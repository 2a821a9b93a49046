"""From a batch of uint8 views to what the detector sees: crops, photometric augmentation, normalisation, on the device.

Crops are cut from the views before the augmentation, each then gets its own (paper, section 3.1). What lies under the
padding of a batch changes nothing.

Crops are cut from the exact boxes. Antialiasing: on a processor by averages of 2, 4, ... pixels
(:class:`siamese_detr.views.resample.Pyramid`); on an accelerator each output pixel is the mean of a grid of bilinear
samples at most one pixel apart (RoIAlign), a box filter where Pillow's is a triangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from siamese_detr.runtime.gpu import runs_kernels, send
from siamese_detr.views.batch import ViewBatch, ViewInputs, valid_mask
from siamese_detr.views.photometric import augment, processing_order
from siamese_detr.views.photometric_cpu import augment_picture, normalise_into
from siamese_detr.views.resample import Picture, Pyramid, one_thread

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
    host = np.ascontiguousarray(host.swapaxes(0, 1))  # (V, B, 1 + P, K)
    of_views, of_crops = host[:, :, 0].reshape(-1, host.shape[-1]), host[:, :, 1:].reshape(-1, host.shape[-1])
    mask = valid_mask(sizes, *images.shape[-2:])
    norm = _Normalise.of(mean, std)
    if sizes.device.type == "cpu":
        make_views, make_crops = _views_one_by_one, _crops_one_by_one
    elif runs_kernels(sizes):
        make_views, make_crops = _views_by_kernel, _crops_by_kernel
    else:
        make_views, make_crops = _views, _crops
    crops = None
    with one_thread():
        views = make_views(images, sizes, mask, of_views, norm)
        if crop_size:
            crops = make_crops(images, sizes, boxes, of_crops, norm, crop_size)
    return ViewInputs(
        pixel_values=views,
        pixel_mask=mask,
        sizes=sizes,
        boxes=boxes,
        query_boxes=batch["query_boxes"].transpose(0, 1),
        crops=crops,
    )


@dataclass(frozen=True)
class _Normalise:
    """(x - mean) / std; three numbers each, on the host."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]

    @classmethod
    def of(cls, mean: Sequence[float], std: Sequence[float]) -> _Normalise:
        return cls(np.array(mean, np.float32), np.array(std, np.float32))

    @cached_property
    def matrix(self) -> NDArray[np.float32]:
        """(3, 4), the same as an affine map of colours."""
        return np.concatenate([np.diag(1 / self.std), (-self.mean / self.std)[:, None]], 1, dtype=np.float32)

    def apply(self, pixels: Tensor) -> Tensor:
        """Images (n, 3, H, W), in place."""
        scale, shift = (
            send(torch.from_numpy(x), pixels.device).view(3, 1, 1) for x in (1 / self.std, -self.mean / self.std)
        )
        return torch.addcmul(shift, pixels, scale, out=pixels)


# ------------------------------------------------------------------------------------ one by one (processor)


def _views_one_by_one(
    images: Tensor, sizes: Tensor, mask: Tensor, parameters: NDArray[np.float32], norm: _Normalise
) -> Tensor:
    """Views at their valid sizes, one after the other: padding is never touched, and each stays in the cache."""
    flat = images.flatten(0, 1)
    out = torch.empty(flat.shape)
    for i, (height, width) in enumerate(sizes.tolist()):
        out[i, :, height:] = 0
        out[i, :, :height, width:] = 0
        _augment_into(out[i, :, :height, :width], _host(flat[i], height, width), parameters[i], norm)
    return out


def _crops_one_by_one(
    images: Tensor, sizes: Tensor, boxes: Tensor, parameters: NDArray[np.float32], norm: _Normalise, size: int
) -> Tensor:
    """Crops cut from pyramids of the views, one after the other."""
    regions = boxes.shape[2]
    flat, rectangles = images.flatten(0, 1), boxes.flatten(0, 2).numpy()
    out = torch.empty((len(rectangles), 3, size, size))
    for i, extent in enumerate(sizes.tolist()):
        pyramid = Pyramid(_host(flat[i], *extent))
        for row in range(i * regions, (i + 1) * regions):
            _augment_into(out[row], pyramid.crop(rectangles[row], size), parameters[row], norm)
    return out


def _augment_into(out: Tensor, picture: Picture, parameters: NDArray[np.float32], norm: _Normalise) -> None:
    pixels = np.multiply(picture, np.float32(1 / 255), dtype=np.float32)
    normalise_into(out.numpy(), augment_picture(pixels, parameters), norm.matrix)


def _host(image: Tensor, height: int, width: int) -> Picture:
    """The valid part of a view (3, H, W) as a picture (height, width, 3)."""
    return image[:, :height, :width].permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------ all at once (accelerator)


def _views(images: Tensor, sizes: Tensor, mask: Tensor, parameters: NDArray[np.float32], norm: _Normalise) -> Tensor:
    """All views in one tensor, in the order of their operations, then put back."""
    if len(parameters) == 0:
        return torch.zeros(images.flatten(0, 1).shape, device=images.device)
    order = processing_order(parameters)
    where = send(torch.from_numpy(order), images.device)
    pixels = _to_float(images.flatten(0, 1)[where]).mul_(mask[where].unsqueeze(1))
    augment(pixels, parameters[order], sizes[where])
    out = torch.empty_like(pixels)
    out[where] = norm.apply(pixels)
    return out.masked_fill_(~mask.unsqueeze(1), 0)


def _crops(
    images: Tensor, sizes: Tensor, boxes: Tensor, parameters: NDArray[np.float32], norm: _Normalise, size: int
) -> Tensor:
    """All crops cut by RoIAlign, in the order of their operations, augmented together, and put back."""
    if len(parameters) == 0:
        return torch.zeros((0, 3, size, size), device=images.device)
    order = processing_order(parameters)
    where = send(torch.from_numpy(order), images.device)
    cut = _cut(images, sizes, boxes, where, size)
    augment(cut, parameters[order], sizes.new_full((len(cut), 2), size))
    out = torch.empty_like(cut)
    out[where] = norm.apply(cut)
    return out


def _cut(images: Tensor, sizes: Tensor, boxes: Tensor, which: Tensor, size: int) -> Tensor:
    """Crops in [0, 1], those of the numbers ``which`` among all, by RoIAlign."""
    pixels = _to_float(images.flatten(0, 1))
    # Bilinear samples at the last valid pixel's far half read the next pixel: repeat the border there.
    index = torch.arange(len(sizes), device=sizes.device)
    after_y, after_x = (torch.clamp(sizes[:, i], max=pixels.shape[2 + i] - 1) for i in range(2))
    pixels[index, :, :, after_x] = pixels[index, :, :, sizes[:, 1] - 1]
    pixels[index, :, after_y] = pixels[index, :, sizes[:, 0] - 1]
    flat = boxes.flatten(0, 2)[which]
    rois = torch.cat([(which // boxes.shape[2])[:, None].to(flat.dtype), flat], 1)
    return roi_align(pixels, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=True)


def _to_float(images: Tensor) -> Tensor:
    """uint8 images as contiguous floats in [0, 1]."""
    return images.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)


# ------------------------------------------------------------------------------------ by our own kernels (GPU)


def _views_by_kernel(
    images: Tensor, sizes: Tensor, mask: Tensor, parameters: NDArray[np.float32], norm: _Normalise
) -> Tensor:
    """All views, each pixel read and written once."""
    from siamese_detr.kernels import gpu_photometric

    return gpu_photometric.augment(images.flatten(0, 1), parameters, sizes, norm.mean, norm.std)


def _crops_by_kernel(
    images: Tensor, sizes: Tensor, boxes: Tensor, parameters: NDArray[np.float32], norm: _Normalise, size: int
) -> Tensor:
    """All crops cut by RoIAlign, then as the views."""
    from siamese_detr.kernels import gpu_photometric

    cut = _cut(images, sizes, boxes, torch.arange(len(parameters), device=images.device), size)
    return gpu_photometric.augment(cut, parameters, sizes.new_full((len(cut), 2), size), norm.mean, norm.std)
