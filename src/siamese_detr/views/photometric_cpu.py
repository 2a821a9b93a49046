"""The photometric augmentation of one picture on a processor, by OpenCV's vectorised float kernels.

The same operations as :mod:`siamese_detr.views.photometric` (tests hold both to torchvision), one picture at a time: it
stays in the processor's cache, which makes this several times as fast there as tensor operations on a batch.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from siamese_detr.views.photometric import (
    BRIGHTNESS,
    CONTRAST,
    GRAY,
    HUE,
    LUMA,
    ORDER,
    ORDERS,
    SIGMA,
    blur_radius,
)

Floats = NDArray[np.float32]

_LUMA_ROWS = np.tile(np.array(LUMA, np.float32), (3, 1))


def augment_picture(pixels: Floats, parameters: Floats) -> Floats:
    """Augment one picture.

    Args:
        pixels: (H, W, 3) in [0, 1], contiguous; may be overwritten.
        parameters: (K,), columns :data:`~siamese_detr.views.batch.PHOTOMETRIC`.
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


def normalise_into(out: Floats, pixels: Floats, matrix: Floats) -> None:
    """Write an affine map (3, 4) of the colours of a picture (H, W, 3) into the planes ``out`` (3, H, W)."""
    cv2.split(cv2.transform(pixels, matrix), list(out))


def _blend(pixels: Floats, operation: int, factor: float) -> Floats:
    if operation == BRIGHTNESS:
        pixels *= factor
    elif operation == CONTRAST:
        level = float(np.dot(cv2.mean(pixels)[:3], LUMA))
        pixels *= factor
        pixels += (1 - factor) * level
    else:
        matrix = np.float32(factor) * np.eye(3, dtype=np.float32) + np.float32(1 - factor) * _LUMA_ROWS
        pixels = cv2.transform(pixels, matrix)  # type: ignore
    if factor > 1:  # less contrast and the like stay between the two images
        np.clip(pixels, 0, 1, out=pixels)
    return pixels
