"""Photometric augmentation of many images at once, each with its own parameters: colour jitter, greyscale, blur.

Semantics are those of ``torchvision.transforms.v2.functional`` on float images, in each image's own random order:

- brightness, contrast and saturation are blends, clamped to [0, 1]: affine maps of the pixel, applied together;
- hue turns HSV's hue, by a formula without the conversion's branches;
- the blur is a true Gaussian cut at three sigma; beyond the border of the valid area the image is mirrored.

Images are expected sorted (:func:`processing_order`), so that those that turn the hue at the same point are neighbours,
and hue and blur are paid only by the images that use them. Parameters stay on the host: nothing here waits for the
device. On a processor :mod:`siamese_detr.views.photometric_cpu` does the same faster.
"""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from siamese_detr.runtime.gpu import send
from siamese_detr.views.batch import PHOTOMETRIC

BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, SIGMA = range(len(PHOTOMETRIC))
ORDERS = np.array(list(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE))))
"""(24, 4): the operation at each of the four slots, for each value of ``order``."""
LUMA = (0.2989, 0.587, 0.114)


def hue_slot(parameters: NDArray[np.float32]) -> NDArray[np.int64]:
    """The slot (n,) at which hue is turned, 0 to 3; -1 for images without colour jitter."""
    order = parameters[:, ORDER].astype(np.int64)
    return np.where(order < 0, -1, (ORDERS[order] == HUE).argmax(1))


def processing_order(parameters: NDArray[np.float32]) -> NDArray[np.int64]:
    """Order (n,) in which images that are augmented together are neighbours, those with blur last among them."""
    return np.lexsort((parameters[:, SIGMA], hue_slot(parameters)))


def augment(pixels: Tensor, parameters: NDArray[np.float32], sizes: Tensor) -> Tensor:
    """Augment images, in place.

    Args:
        pixels: float (n, 3, H, W) in [0, 1], 0 outside the valid area.
        parameters: (n, K) on the host, columns :data:`~siamese_detr.views.batch.PHOTOMETRIC`, sorted by
            :func:`processing_order`.
        sizes: (n, 2) valid (height, width) on the pixels' device.
    Returns:
        ``pixels``; what is outside the valid area is arbitrary but finite.
    """
    slots = hue_slot(parameters)
    for slot in np.unique(slots).tolist():
        first, last = np.searchsorted(slots, [slot, slot + 1]).tolist()
        _augment_alike(pixels[first:last], parameters[first:last], sizes[first:last])
    return pixels


def _augment_alike(pixels: Tensor, parameters: NDArray[np.float32], sizes: Tensor) -> None:
    """Augment images, in place, that all turn the hue at the same slot (or have no colour jitter)."""
    if parameters[0, ORDER] >= 0:
        orders = ORDERS[parameters[:, ORDER].astype(np.int64)]
        for operations in orders.T:
            if operations[0] == HUE:
                turn_hue(pixels, parameters[:, HUE])
            else:
                factors = np.take_along_axis(parameters, operations[:, None], 1)[:, 0]
                _blend(pixels, operations, factors, sizes)
    gray = np.flatnonzero(parameters[:, GRAY] > 0)
    if len(gray):
        where = send(torch.from_numpy(gray), pixels.device)
        pixels[where] = luma(pixels[where]).unsqueeze(1).expand(-1, 3, -1, -1)
    sigmas = parameters[:, SIGMA]
    if sigmas.any():
        first = int((sigmas > 0).argmax())  # sorted by sigma: the blurred ones are the last
        blur(pixels[first:], sigmas[first:], sizes[first:])


def _each(values: NDArray, like: Tensor) -> Tensor:
    """Numbers (n,) of the host as (n, 1, 1, 1) on the device of ``like``."""
    return send(torch.from_numpy(np.ascontiguousarray(values, np.float32)), like.device).view(-1, 1, 1, 1)


def luma(pixels: Tensor) -> Tensor:
    """Greyscale (n, H, W) of images (n, 3, H, W)."""
    red, green, blue = pixels.unbind(1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _blend(pixels: Tensor, operations: NDArray[np.int64], factors: NDArray[np.float32], sizes: Tensor) -> None:
    """Brightness, contrast or saturation, each image its own: factor * x + (1 - factor) * other, clamped; in place."""
    rest = 1 - factors
    other: Tensor | None = None
    if (operations == SATURATION).any():
        other = luma(pixels).unsqueeze(1).mul_(_each(rest * (operations == SATURATION), pixels))
    if (operations == CONTRAST).any():
        # The mean of the greyscale image, over valid pixels: the others are still 0 (only contrast lifts them).
        count = sizes.prod(1)[:, None, None, None]
        level = luma(pixels.sum((2, 3), keepdim=True)).unsqueeze(1)
        level = level.mul_(_each(rest * (operations == CONTRAST), pixels)).div_(count)
        other = level if other is None else other.add_(level)
    factor = _each(factors, pixels)
    if other is None:
        pixels.mul_(factor)
    else:
        torch.addcmul(other, pixels, factor, out=pixels)
    if factors.max() > 1:  # less contrast and the like stay between the two images
        pixels.clamp_(0, 1)


def turn_hue(pixels: Tensor, turns: NDArray[np.float32]) -> None:
    """Turn the hue of images (n, 3, H, W) by ``turns`` (n,) of the circle, at most one half, in place.

    In HSV a colour is ``least + chroma * t(hue)`` for each channel, with t a trapezoid of the hue.
    """
    red, green, blue = pixels.unbind(1)
    most = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    # The cases by 0/1 floats and interpolation.
    is_red = torch.eq(most, red, out=torch.empty_like(most))
    is_green = torch.eq(most, green, out=torch.empty_like(most))
    hue = torch.lerp(torch.lerp(red - green, blue - red, is_green), green - blue, is_red)
    # One more turn keeps it positive. Red is at 0, green at 1/3, blue at 2/3; grey pixels have chroma 0 and any hue.
    turn = _each(turns + 1, pixels)[..., 0]
    offset = torch.lerp(torch.add(turn + 2 / 3, is_green, alpha=-1 / 3), turn, is_red)
    chroma6 = most.sub_(least).mul_(6)
    hue = torch.addcdiv(offset, hue, torch.add(chroma6, 1e-12, out=is_red), out=hue).frac_()
    for channel, centre in ((green, 1 / 3), (blue, 2 / 3)):
        trapezoid = torch.rsub(torch.sub(hue, centre, out=offset).abs_(), 1 / 3).clamp_(0, 1 / 6)
        torch.addcmul(least, chroma6, trapezoid, out=channel)
    torch.addcmul(least, chroma6, hue.sub_(1 / 2).abs_().sub_(1 / 6).clamp_(0, 1 / 6), out=red)


def blur_radius(sigma: float) -> int:
    """Pixels on each side that the blur looks at: three sigma, rounded up."""
    return math.ceil(3 * sigma)


def blur(pixels: Tensor, sigmas: NDArray[np.float32], sizes: Tensor) -> None:
    """Gaussian blur of images (n, 3, H, W), in place.

    Args:
        sigmas: (n,) standard deviations in pixels; each kernel is cut at its own three sigma.
        sizes: (n, 2) valid (height, width): the image is mirrored at its edges, its last row or column not repeated.
    """
    radius = blur_radius(float(sigmas.max()))
    steps = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (steps / sigmas[:, None]) ** 2) * (np.abs(steps) <= np.ceil(3 * sigmas)[:, None])
    weights /= weights.sum(1, keepdims=True)
    kernel = send(torch.from_numpy(weights.astype(np.float32)), pixels.device)
    count, channels = pixels.shape[:2]
    kernel = kernel.repeat_interleave(channels, 0)[:, None, None]
    for axis in (3, 2):
        lines = pixels if axis == 3 else pixels.transpose(2, 3)
        length = lines.shape[3]
        extent = sizes[:, axis - 2, None]
        places = torch.arange(-radius, length + radius, device=pixels.device)
        period = (2 * extent - 2).clamp(min=1)
        places = torch.remainder(places.abs(), period)
        places = torch.minimum(places, period - places).clamp(max=length - 1)
        index = torch.where(extent > 1, places, 0)[:, None, None].expand(-1, channels, lines.shape[2], -1)
        padded = lines.gather(3, index).view(1, count * channels, lines.shape[2], -1)
        lines.copy_(F.conv2d(padded, kernel, groups=count * channels).view_as(lines))
