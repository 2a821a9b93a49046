"""The kernels of ``siamese_detr::augment`` and ``siamese_detr::cut`` for CUDA devices.

Every pixel is read, augmented, normalised and written once. The functions are those of
:mod:`siamese_detr.views.photometric`. Contrast needs the mean of what
the operations before it make of an image: a first kernel computes these means. The blur is two passes over the images
that have one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from siamese_detr.runtime.gpu import send
from siamese_detr.views.photometric import CONTRAST, GRAY, HUE, LUMA, ORDER, ORDERS, SATURATION, SIGMA, blur_radius
from siamese_detr.views.photometric import augment as augment_operation
from siamese_detr.views.photometric import cut as cut_operation

PIXELS = 1024
"""Pixels of a program."""
NONE = -1
"""The operation of images without colour jitter."""
COLUMNS = 9
"""Of the table of operations: four operations, their four values, and whether the image becomes grey."""

_CONTRAST, _SATURATION, _HUE = tl.constexpr(CONTRAST), tl.constexpr(SATURATION), tl.constexpr(HUE)
_NONE, _COLUMNS = tl.constexpr(NONE), tl.constexpr(COLUMNS)
_RED, _GREEN, _BLUE = (tl.constexpr(share) for share in LUMA)


@cut_operation.register_kernel("cuda")
def cut(images: Tensor, sizes: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops by RoIAlign: each pixel is the mean of a grid of bilinear samples at most one pixel apart, a box filter.

    Float in [0, 1], which :func:`augment` takes as well: rounding to whole levels would need one more pass.
    """
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255)
    # Bilinear samples at the last valid pixel's far half read the next pixel: repeat the border there.
    index = torch.arange(len(sizes), device=sizes.device)
    after_y, after_x = (torch.clamp(sizes[:, i], max=pixels.shape[2 + i] - 1) for i in range(2))
    pixels[index, :, :, after_x] = pixels[index, :, :, sizes[:, 1] - 1]
    pixels[index, :, after_y] = pixels[index, :, sizes[:, 0] - 1]
    owners = index.repeat_interleave(boxes.shape[1])[:, None].to(boxes.dtype)
    rois = torch.cat([owners, boxes.flatten(0, 1)], 1)
    return roi_align(pixels, rois, (size, size), spatial_scale=1.0, sampling_ratio=-1, aligned=True)


@augment_operation.register_kernel("cuda")
def augment(pixels: Tensor, parameters: Tensor, sizes: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """See the reference; ``pixels`` may also be float in [0, 1]. The result is channels last."""
    count, _, height, width = pixels.shape
    out = torch.empty(pixels.shape, device=pixels.device, memory_format=torch.channels_last)
    if not out.numel():
        return out
    host = parameters.numpy()
    operations = _table(host, pixels.device)
    blocks = triton.cdiv(height * width, PIXELS)
    unit = 1.0 if pixels.is_floating_point() else 1 / 255
    normal = [*(1 / x for x in std), *(-x / y for x, y in zip(mean, std, strict=True))]
    source = pixels, *pixels.stride(), unit, sizes, operations
    with torch.cuda.device_of(pixels):
        parts = torch.empty(count, blocks, device=pixels.device)
        _brightness[(count * blocks,)](*source, parts, height, width, PIXELS)
        means = parts.sum(1).div_(sizes.prod(1))
        _augment[(count * blocks,)](*source, means, *normal, out, height, width, PIXELS)
        _blur(out, host[:, SIGMA], sizes)
    return out


def _table(parameters: NDArray[np.float32], device: torch.device) -> Tensor:
    """The operations of each image in its order (n, COLUMNS)."""
    order = parameters[:, ORDER].astype(np.int64)
    operations = ORDERS[order]
    table = np.empty((len(parameters), COLUMNS), np.float32)
    table[:, :4] = np.where(order[:, None] < 0, NONE, operations)
    table[:, 4:8] = np.take_along_axis(parameters, operations, 1)
    table[:, 8] = parameters[:, GRAY]
    return send(torch.from_numpy(table), device)


@triton.jit
def _part(size, PIXELS: tl.constexpr):
    """Image of a program, and which of its ``size`` values are the program's. All are in the grid's first direction:
    CUDA allows few in the others."""
    blocks = tl.cdiv(size, PIXELS)
    image, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    return image, block * PIXELS + tl.arange(0, PIXELS)


@triton.jit
def _load(pixels, image, place, of_image, of_channel, of_row, of_column, unit, sizes, width):
    """Red, green and blue of pixels of an image, 0 outside the valid area; and which are inside."""
    row, column = place // width, place % width
    inside = (row < tl.load(sizes + 2 * image)) & (column < tl.load(sizes + 2 * image + 1))
    pixels += image.to(tl.int64) * of_image + row * of_row + column * of_column
    red = tl.load(pixels, mask=inside, other=0).to(tl.float32) * unit
    green = tl.load(pixels + of_channel, mask=inside, other=0).to(tl.float32) * unit
    blue = tl.load(pixels + 2 * of_channel, mask=inside, other=0).to(tl.float32) * unit
    return red, green, blue, inside


@triton.jit
def _luma(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _turn_hue(red, green, blue, turn):
    most = tl.maximum(tl.maximum(red, green), blue)
    least = tl.minimum(tl.minimum(red, green), blue)
    is_red, is_green = most == red, most == green
    hue = tl.where(is_red, green - blue, tl.where(is_green, blue - red, red - green))
    offset = tl.where(is_red, 0.0, tl.where(is_green, 1 / 3, 2 / 3))
    chroma = 6 * (most - least)
    hue = hue / (chroma + 1e-12) + offset + (turn + 1)
    hue -= tl.floor(hue)
    to_red = tl.abs(hue - 1 / 2) - 1 / 6
    to_green = 1 / 3 - tl.abs(hue - 1 / 3)
    to_blue = 1 / 3 - tl.abs(hue - 2 / 3)
    red = least + chroma * tl.minimum(tl.maximum(to_red, 0.0), 1 / 6)
    green = least + chroma * tl.minimum(tl.maximum(to_green, 0.0), 1 / 6)
    blue = least + chroma * tl.minimum(tl.maximum(to_blue, 0.0), 1 / 6)
    return red, green, blue


@triton.jit
def _operate(red, green, blue, operation, value, mean):
    if operation == _HUE:
        red, green, blue = _turn_hue(red, green, blue, value)
    else:
        other = tl.where(operation == _SATURATION, _luma(red, green, blue), tl.where(operation == _CONTRAST, mean, 0.0))
        other *= 1 - value
        red = tl.minimum(tl.maximum(red * value + other, 0.0), 1.0)
        green = tl.minimum(tl.maximum(green * value + other, 0.0), 1.0)
        blue = tl.minimum(tl.maximum(blue * value + other, 0.0), 1.0)
    return red, green, blue


@triton.jit
def _brightness(
    pixels, of_image, of_channel, of_row, of_column, unit, sizes, operations, parts, height, width, PIXELS: tl.constexpr
):  # fmt: skip
    """The sum of an image's luma where its contrast is about to change, a part for each program."""
    image, place = _part(height * width, PIXELS)
    operations += image * _COLUMNS
    total = 0.0
    if tl.load(operations) != _NONE:
        red, green, blue, _ = _load(
            pixels, image, place, of_image, of_channel, of_row, of_column, unit, sizes, width
        )  # fmt: skip
        before = True
        for slot in tl.static_range(4):
            operation = tl.load(operations + slot)
            before = before & (operation != _CONTRAST)
            if before:
                red, green, blue = _operate(red, green, blue, operation, tl.load(operations + 4 + slot), 0.0)
        total = tl.sum(_luma(red, green, blue))  # of 0 outside the valid area
    tl.store(parts + tl.program_id(0), total)


@triton.jit
def _augment(
    pixels, of_image, of_channel, of_row, of_column, unit, sizes, operations, means,
    red_scale, green_scale, blue_scale, red_shift, green_shift, blue_shift, out, height, width, PIXELS: tl.constexpr,
):  # fmt: skip
    image, place = _part(height * width, PIXELS)
    operations += image * _COLUMNS
    red, green, blue, inside = _load(
        pixels, image, place, of_image, of_channel, of_row, of_column, unit, sizes, width
    )  # fmt: skip
    if tl.load(operations) != _NONE:
        mean = tl.load(means + image)
        for slot in tl.static_range(4):
            operation, value = tl.load(operations + slot), tl.load(operations + 4 + slot)
            red, green, blue = _operate(red, green, blue, operation, value, mean)
    if tl.load(operations + 8) > 0:
        red = _luma(red, green, blue)
        green = red
        blue = red
    out += (image.to(tl.int64) * height * width + place) * 3
    exists = place < height * width
    tl.store(out, tl.where(inside, red * red_scale + red_shift, 0.0), mask=exists)
    tl.store(out + 1, tl.where(inside, green * green_scale + green_shift, 0.0), mask=exists)
    tl.store(out + 2, tl.where(inside, blue * blue_scale + blue_shift, 0.0), mask=exists)


def _blur(images: Tensor, sigmas: NDArray[np.float32], sizes: Tensor) -> None:
    """Blur those images (n, 3, H, W), channels last, that have a sigma; in place."""
    chosen = np.flatnonzero(sigmas > 0)
    if not len(chosen):
        return
    host = np.stack([chosen, [blur_radius(float(sigma)) for sigma in sigmas[chosen]], sigmas[chosen]]).astype(
        np.float32
    )
    which = send(torch.from_numpy(host), images.device)
    _, channels, height, width = images.shape
    between = torch.empty(len(chosen), height, width, channels, device=images.device)
    blocks = triton.cdiv(height * width * channels, PIXELS)
    for rows in (False, True):
        _blur_lines[(len(chosen) * blocks,)](images, between, which, sizes, len(chosen), height, width, rows, PIXELS)


@triton.jit
def _blur_lines(images, between, which, sizes, count, height, width, ROWS: tl.constexpr, PIXELS: tl.constexpr):
    """Blur along the rows of ``images`` into ``between``, or along the columns back. Beyond the valid area the image is
    mirrored, its last pixel not repeated."""
    number, here = _part(height * width * 3, PIXELS)
    image = tl.load(which + number).to(tl.int64)
    radius, sigma = tl.load(which + count + number).to(tl.int32), tl.load(which + 2 * count + number)
    tall, wide = tl.load(sizes + 2 * image).to(tl.int32), tl.load(sizes + 2 * image + 1).to(tl.int32)
    row, column, channel = here // 3 // width, here // 3 % width, here % 3
    shown = (row < tall) & (column < wide)
    source = images + image * height * width * 3
    target = between + number.to(tl.int64) * height * width * 3
    if ROWS:
        source, target = target, source
    extent = tall if ROWS else wide
    period = tl.maximum(2 * extent - 2, 1)
    total = tl.zeros((PIXELS,), tl.float32)
    weights = 0.0
    for step in range(-radius, radius + 1):
        weight = tl.exp(-0.5 * (step / sigma) * (step / sigma))
        weights += weight
        place = tl.abs((row if ROWS else column) + step) % period
        place = tl.minimum(tl.minimum(place, period - place), extent - 1)
        at = (place * width + column) if ROWS else (row * width + place)
        total += weight * tl.load(source + at * 3 + channel, mask=shown, other=0.0)
    tl.store(target + here, total / weights, mask=shown)
