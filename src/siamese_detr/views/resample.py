"""Cutting and resizing a rectangle of an image, with corners between pixels, in one resampling on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Picture = NDArray[np.uint8]


@contextmanager
def one_thread() -> Iterator[None]:
    """Let OpenCV use one thread: on images this small, several cost more than they gain."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def resize(image: Picture, rectangle: ArrayLike, size: tuple[int, int], flip: bool = False) -> Picture:
    """Antialiased bilinear resizing, as Pillow's ``resize(size, BILINEAR, box=rectangle)``, optionally mirrored.

    Args:
        image: (H, W, 3).
        rectangle: (4,) x0 y0 x1 y1 in pixels of the image, inside it, of positive area.
        size: (height, width) of the result.
    Returns:
        (height, width, 3).
    """
    x0, y0, x1, y1 = (float(x) for x in np.asarray(rectangle))
    if x1 - x0 <= size[1] and y1 - y0 <= size[0]:
        # When enlarging, the filter is plain bilinear interpolation: equal within 1 of 255, in half the time.
        return warp(image, rectangle, size, flip)
    # With reducing_gap, Pillow first averages whole pixels if the reduction is strong.
    resized = Image.fromarray(image).resize(
        size[::-1], Image.Resampling.BILINEAR, box=(x0, y0, x1, y1), reducing_gap=3.0
    )
    pixels = np.asarray(resized)
    return pixels[:, ::-1] if flip else pixels


def warp(image: Picture, rectangle: ArrayLike, size: tuple[int, int], flip: bool = False) -> Picture:
    """Bilinear interpolation without antialiasing; pixels beyond the image repeat its border."""
    x0, y0, x1, y1 = np.asarray(rectangle, np.float64).tolist()
    step_x, step_y = (x1 - x0) / size[1], (y1 - y0) / size[0]
    if flip:
        x0, step_x = x1, -step_x
    inverse = np.array([[step_x, 0, x0 + step_x / 2 - 0.5], [0, step_y, y0 + step_y / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, inverse, size[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)  # type: ignore


class Pyramid:
    """An image and its halvings along either axis, from which many crops are cut quickly.

    A crop is interpolated from the halving nearest to its scale. Averages of 2, 4, ... pixels along each axis are its
    antialiasing.
    """

    def __init__(self, image: Picture) -> None:
        self._levels = {(0, 0): np.ascontiguousarray(image)}

    def crop(self, rectangle: ArrayLike, size: int) -> Picture:
        """The rectangle (4,), pixels of the image, as a square (size, size, 3)."""
        x0, y0, x1, y1 = np.asarray(rectangle, np.float64).tolist()
        level_y, level_x = (round(math.log2(max(extent / size, 1))) for extent in (y1 - y0, x1 - x0))
        image = self._level((level_y, level_x))
        height, width = self._levels[0, 0].shape[:2]
        scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
        return warp(image, (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y), (size, size))

    def _level(self, level: tuple[int, int]) -> Picture:
        if level not in self._levels:
            coarser_x = level[1] >= level[0]
            coarser_y = level[0] >= level[1]
            source = self._level((level[0] - coarser_y, level[1] - coarser_x))
            height, width = source.shape[:2]
            half = ((width + 1) // 2 if coarser_x else width, (height + 1) // 2 if coarser_y else height)
            # At half the size, linear interpolation is the mean of two neighbours.
            self._levels[level] = cv2.resize(source, half, interpolation=cv2.INTER_LINEAR)  # type: ignore
        return self._levels[level]
