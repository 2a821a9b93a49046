"""Cutting crops and photometric augmentation (paper, section 3.1), as operations.

``siamese_detr::cut`` and ``siamese_detr::augment`` stand here in reference form: picture by picture on the host, by
OpenCV's vectorised float kernels. A picture stays in the processor's cache, so this is also what runs on a CPU. Kernels
for CUDA devices are registered by ``siamese_detr.kernels``.

The augmentation has the semantics of ``torchvision.transforms.v2.functional`` on float images, in the order that each
image draws:

- brightness, contrast and saturation are blends, clamped to [0, 1];
- hue turns HSV's hue;
- the blur is a true Gaussian cut at three sigma; beyond the border of the valid area the image is mirrored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from siamese_detr.views.resample import Pyramid, one_thread

Floats = NDArray[np.float32]

PHOTOMETRIC = ("brightness", "contrast", "saturation", "hue", "order", "gray", "sigma")
"""Columns of the parameters of a picture. Factors are 1 and hue is 0 where the colour jitter is not applied; ``order``
is the index of the permutation of the first four, -1 where none is applied; ``gray`` is 0 or 1; ``sigma`` is the
blur's standard deviation in pixels, 0 for none."""
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA = range(len(PHOTOMETRIC))
ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
"""(24, 4): the operation at each of the four slots, for each value of ``order``."""
LUMA = (0.2989, 0.587, 0.114)
_LUMA_ROWS = np.tile(np.array(LUMA, np.float32), (3, 1))


@torch.library.custom_op("siamese_detr::augment", mutates_args=())
def augment(pixels: Tensor, parameters: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Augment and normalise images.

    Args:
        pixels: uint8 (n, 3, H, W), of any strides; what is outside the valid area is not read.
        parameters: float32 (n, K) on the host, columns :data:`PHOTOMETRIC`.
        sizes: int64 (n, 2) valid (height, width), on the pixels' device.
        mean, std: of the normalisation, three each, for pixels in [0, 1].

    Returns:
        float32 (n, 3, H, W), 0 outside the valid area.
    """
    scale, shift = 1 / np.array(std, np.float32), -np.array(mean, np.float32) / np.array(std, np.float32)
    matrix = np.concatenate([np.diag(scale), shift[:, None]], 1, dtype=np.float32)  # an affine map of colours
    images, out = pixels.cpu(), torch.empty(pixels.shape)
    with one_thread():
        for i, (height, width) in enumerate(sizes.tolist()):
            # Padding is never touched.
            out[i, :, height:] = 0
            out[i, :, :height, width:] = 0
            picture = images[i, :, :height, :width].permute(1, 2, 0).numpy()
            floats = augment_picture(
                np.multiply(picture, np.float32(1 / 255), dtype=np.float32, order="C"), parameters[i].numpy()
            )
            cv2.split(cv2.transform(floats, matrix), list(out[i, :, :height, :width].numpy()))
    return out.to(pixels.device)


@torch.library.custom_op("siamese_detr::cut", mutates_args=())
def cut(images: Tensor, sizes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut square crops from the exact boxes, antialiased by averages of 2, 4, ... pixels along each axis.

    Args:
        images: uint8 (n, 3, H, W).
        sizes: int64 (n, 2) valid (height, width), on the images' device.
        boxes: float32 (n, P, 4) xyxy in pixels, inside the valid area.
        size: side of the crops, pixels.

    Returns:
        uint8 (n * P, 3, size, size), image after image.
    """
    rectangles, regions = boxes.cpu().flatten(0, 1).numpy(), boxes.shape[1]
    out = torch.empty((len(rectangles), size, size, 3), dtype=torch.uint8)
    with one_thread():
        for i, (height, width) in enumerate(sizes.tolist()):
            pyramid = Pyramid(images[i, :, :height, :width].permute(1, 2, 0).cpu().numpy())
            for row in range(i * regions, (i + 1) * regions):
                out[row] = torch.from_numpy(pyramid.crop(rectangles[row], size))
    return out.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last).to(images.device)


def augment_picture(pixels: Floats, parameters: Floats) -> Floats:
    """Augment one picture.

    Args:
        pixels: (H, W, 3) in [0, 1], contiguous; may be overwritten.
        parameters: (K,), columns :data:`PHOTOMETRIC`.
    """
    order = int(parameters[ORDER])
    for operation in ORDERS[order].tolist() if order >= 0 else ():
        amount = float(parameters[operation])
        if operation == HUE:
            hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
            # Degrees; one more turn keeps them positive, which OpenCV's conversion back relies on.
            pixels = cv2.cvtColor(cv2.add(hsv, (360 * (amount + 1), 0, 0, 0)), cv2.COLOR_HSV2RGB)  # type: ignore
        else:
            pixels = _blend(pixels, operation, amount)
    if parameters[GRAY] > 0:
        pixels = cv2.transform(pixels, _LUMA_ROWS)  # type: ignore
    sigma = float(parameters[SIGMA])
    if sigma > 0:
        side = 2 * blur_radius(sigma) + 1
        pixels = cv2.GaussianBlur(pixels, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)  # type: ignore
    return pixels


def blur_radius(sigma: float) -> int:
    """Pixels on each side that the blur looks at: three sigma, rounded up."""
    return math.ceil(3 * sigma)


def _blend(pixels: Floats, operation: int, factor: float) -> Floats:
    """factor * x + (1 - factor) * other; other is black, the mean grey, or each pixel's grey."""
    if operation == BRIGHTNESS:
        pixels *= factor
    elif operation == CONTRAST:
        level = float(np.dot(cv2.mean(pixels)[:3], LUMA))
        pixels *= factor
        pixels += (1 - factor) * level
    else:
        matrix = np.float32(factor) * np.eye(3, dtype=np.float32) + np.float32(1 - factor) * _LUMA_ROWS
        pixels = cv2.transform(pixels, matrix)  # type: ignore
    if factor > 1:  # with a smaller factor the result lies between two images
        np.clip(pixels, 0, 1, out=pixels)
    return pixels
