"""Rectangles of the two views and the regions both of them show (paper, section 3.1 and supplement A).

Everything is float64 NumPy on explicit drawn numbers, so that each function can be checked by hand. Three frames
occur: the *original* image, the *base* image (original, resized and perhaps flipped; never materialised) and each
*view*. Boxes and rectangles are ``[x0, y0, x1, y1]`` in pixels, edges at 0 and width/height (pixel ``i`` spans
``[i, i + 1]``).

Where this is more careful than the published research code: boxes are mapped in float64 and clamped to the same edges
on all four sides, so that no region is lost to rounding and none leaves a view; the centred fallback rectangle is as
large as its aspect ratio allows; an image without proposals is padded, not exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

OUTER_TRIES = 10
"""Attempts at an outer rectangle before the centred fallback."""


@dataclass(frozen=True)
class ViewPair:
    """The rectangles of two views, base-image pixels.

    Attributes:
        views: (2, 4), the rectangle that each view shows.
        intersection: (4,), what both show.
        outer: (4,), the smallest rectangle that holds both at their largest.
    """

    views: Array
    intersection: Array
    outer: Array


# ---------------------------------------------------------------------------------------------------- base and outer


def base_sizes(sizes: ArrayLike, short_sides: ArrayLike, max_size: int) -> NDArray[np.int64]:
    """Sizes after resizing the short side to ``short_sides``, the long side at most ``max_size`` (DETR's rule).

    Args:
        sizes: (n, 2) original (width, height).
        short_sides: (n,) wanted short sides.
    Returns:
        (n, 2) integer (width, height), at least 1.
    """
    size = np.asarray(sizes, np.float64).reshape(-1, 2)
    short = np.asarray(short_sides, np.float64).reshape(-1)
    low, high = size.min(1), size.max(1)
    short = np.where(high / low * short > max_size, np.round(max_size * low / high), short)
    short = np.maximum(short, 1)
    long = np.minimum(np.floor(short * high / low + 1e-9), max(max_size, 1))
    portrait = size[:, 0] < size[:, 1]
    width, height = np.where(portrait, short, long), np.where(portrait, long, short)
    return np.stack([width, height], 1).astype(np.int64)


def outer_sizes(
    sizes: ArrayLike,
    area_draws: ArrayLike,
    aspect_draws: ArrayLike,
    area_range: tuple[float, float] = (0.5, 1.0),
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Width and height of the outer rectangles: the first of the tries that fits, else the fallback.

    Args:
        sizes: (n, 2) base (width, height).
        area_draws, aspect_draws: (n, tries) uniform in [0, 1): share of the image's area (uniform in ``area_range``)
            and aspect ratio width / height (log-uniform in ``aspect_range``).
    Returns:
        (n, 2) integer (width, height), and (n,) True where it is the fallback: as large as the image and the allowed
        aspect ratios permit, to be placed in the centre.
    """
    size = np.asarray(sizes, np.float64).reshape(-1, 2)
    area = _lerp(area_draws, *area_range) * size.prod(1, keepdims=True)
    aspect = np.exp(_lerp(aspect_draws, *np.log(aspect_range)))
    width, height = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (width >= 1) & (height >= 1) & (width <= size[:, :1]) & (height <= size[:, 1:])
    first = fits.argmax(1)[:, None]
    drawn = np.concatenate([np.take_along_axis(width, first, 1), np.take_along_axis(height, first, 1)], 1)
    fallback = ~fits.any(1)
    ratio = size[:, 0] / size[:, 1]
    widest = np.where(ratio > aspect_range[1], np.round(size[:, 1] * aspect_range[1]), size[:, 0])
    tallest = np.where(ratio < aspect_range[0], np.round(size[:, 0] / aspect_range[0]), size[:, 1])
    # Rounding may exceed the image by one pixel on images a few pixels wide.
    centred = np.minimum(np.maximum(np.stack([widest, tallest], 1), 1), size)
    return np.where(fallback[:, None], centred, drawn).astype(np.int64), fallback


def outer_rectangle(
    size: tuple[int, int],
    area_draws: ArrayLike,
    aspect_draws: ArrayLike,
    place: ArrayLike,
    area_range: tuple[float, float] = (0.5, 1.0),
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """The outer rectangle (4,) of one image, at whole pixels of the base image.

    Args:
        size: base (width, height).
        area_draws, aspect_draws: (tries,), see :func:`outer_sizes`.
        place: (2,) uniform in [0, 1): horizontal and vertical place in the room left.
    """
    inner, fallback = outer_sizes(
        [size], np.asarray(area_draws)[None], np.asarray(aspect_draws)[None], area_range, aspect_range
    )
    room = np.asarray(size, np.int64) - inner[0]
    corner = room // 2 if fallback[0] else np.floor(np.asarray(place) * (room + 1))
    return np.concatenate([corner, corner + inner[0]]).astype(np.float64)


# ------------------------------------------------------------------------------------------------------------- views


def intersection_rectangle(outer: ArrayLike, iou: float) -> Array:
    """The rectangle in the middle of ``outer``, of its aspect ratio, that the two maximal views share.

    Its height is the positive root of ``a h^2 + b h + c`` with ``a = r (2 + iou)``, ``b = -iou (r H + W)``,
    ``c = -iou H W``, ``r = W / H``: then the two maximal views have an IoU of exactly ``iou``.
    """
    x0, y0, x1, y1 = np.asarray(outer, np.float64)
    width, height = x1 - x0, y1 - y0
    ratio = width / height
    a, b, c = ratio * (2 + iou), -iou * (ratio * height + width), -iou * height * width
    inner_height = (-b + np.sqrt(b * b - 4 * a * c)) / (2 * a)
    margin_x, margin_y = (width - ratio * inner_height) / 2, (height - inner_height) / 2
    return np.array([x0 + margin_x, y0 + margin_y, x1 - margin_x, y1 - margin_y])


def view_pair(
    outer: ArrayLike,
    iou: float = 0.5,
    shrink: tuple[float, float] = (0.0, 0.0),
    swap: bool = False,
    other_diagonal: bool = False,
) -> ViewPair:
    """Two views inside ``outer`` that overlap in a centred intersection.

    The first reaches from the outer rectangle's upper left corner to the intersection's lower right one, the second
    from the intersection's upper left corner to the outer rectangle's lower right one. Shrinking moves a view's outer
    corner towards the intersection, aspect ratio kept; the intersection stays whole, so that the IoU only grows.

    Args:
        iou: IoU of the two views before shrinking, in (0, 1].
        shrink: how far each view's outer corner moves, 0 (not) to 1 (onto the intersection).
        swap: exchange the roles of the two views.
        other_diagonal: upper right and lower left instead.
    """
    frame = np.asarray(outer, np.float64)
    inner = intersection_rectangle(frame, iou)
    first = np.concatenate([_lerp(shrink[0], frame[:2], inner[:2]), inner[2:]])
    second = np.concatenate([inner[:2], _lerp(shrink[1], frame[2:], inner[2:])])
    views = np.stack([first, second])
    if other_diagonal:
        views = mirror(views, frame[0] + frame[2])  # inner is centred: it is its own mirror image
        inner = np.array([views[0, 0], inner[1], views[1, 2], inner[3]])
    return ViewPair(views[::-1].copy() if swap else views, inner, frame)


# ------------------------------------------------------------------------------------------------------------- boxes


def mirror(boxes: ArrayLike, width: float) -> Array:
    """Boxes (..., 4) mirrored left-right in a frame of this width."""
    box = np.asarray(boxes, np.float64)
    return np.stack([width - box[..., 2], box[..., 1], width - box[..., 0], box[..., 3]], -1)


def to_view(boxes: ArrayLike, view: ArrayLike, size: tuple[int, int]) -> Array:
    """Boxes (..., 4) of the base image in the pixels of a view that shows ``view`` at ``size`` = (height, width)."""
    scale, offset = _view_map(view, size)
    return (np.asarray(boxes, np.float64) - offset) * scale


def from_view(boxes: ArrayLike, view: ArrayLike, size: tuple[int, int]) -> Array:
    """Inverse of :func:`to_view`."""
    scale, offset = _view_map(view, size)
    return np.asarray(boxes, np.float64) / scale + offset


def clamp(boxes: ArrayLike, frame: ArrayLike) -> Array:
    """Boxes (..., 4) cut at the edges of ``frame`` (4,), all four edges alike. A box outside gets width or height 0."""
    low, high = np.split(np.asarray(frame, np.float64), 2)
    return np.clip(np.asarray(boxes, np.float64), np.tile(low, 2), np.tile(high, 2))


def areas(boxes: ArrayLike) -> Array:
    """Areas (...,) of boxes (..., 4)."""
    box = np.asarray(boxes, np.float64)
    return (box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1])


def ious(boxes: ArrayLike, other: ArrayLike) -> Array:
    """IoU (n,) of boxes (n, 4) with one box (4,)."""
    a, b = np.asarray(boxes, np.float64), np.asarray(other, np.float64)
    overlap = np.maximum(np.minimum(a[..., 2:], b[2:]) - np.maximum(a[..., :2], b[:2]), 0).prod(-1)
    return overlap / np.maximum(areas(a) + areas(b) - overlap, 1e-300)


def shared_regions(proposals: ArrayLike, intersection: ArrayLike, min_area: float = 0.05) -> tuple[Array, NDArray]:
    """Proposals cut to the intersection, those kept whose area is at least ``min_area`` of it.

    The rule is stated on view 1, but a view's map is affine: the share of the intersection is the same in every frame.

    Returns:
        boxes (k, 4), order kept, and the positions (k,) they had in ``proposals``.
    """
    boxes = clamp(np.asarray(proposals, np.float64).reshape(-1, 4), intersection)
    # A hair of tolerance, so that the rule does not hang on the last bit.
    kept = np.flatnonzero(areas(boxes) >= min_area * (1 - 1e-9) * areas(intersection))
    return boxes[kept], kept


def move_edges(boxes: ArrayLike, offsets: ArrayLike, frame: ArrayLike) -> Array:
    """Boxes (..., 4) whose edges move by ``offsets`` (..., 4) of their width/height, clamped to ``frame`` (4,).

    With |offset| < 0.5 and boxes inside the frame, the result always has positive area.
    """
    box = np.asarray(boxes, np.float64)
    extent = box[..., 2:] - box[..., :2]
    return clamp(box + np.concatenate([extent, extent], -1) * np.asarray(offsets, np.float64), frame)


def pad_regions(boxes: ArrayLike, intersection: ArrayLike, offsets: ArrayLike) -> Array:
    """Padding regions (m, 4): the kept ones in turn (of none: the intersection), edges moved by ``offsets`` (m, 4)."""
    offset = np.asarray(offsets, np.float64).reshape(-1, 4)
    kept = np.asarray(boxes, np.float64).reshape(-1, 4)
    if len(kept) == 0:
        kept = np.asarray(intersection, np.float64).reshape(1, 4)
    return move_edges(kept[np.arange(len(offset)) % len(kept)], offset, intersection)


def _view_map(view: ArrayLike, size: tuple[int, int]) -> tuple[Array, Array]:
    x0, y0, x1, y1 = np.asarray(view, np.float64)
    scale = np.array([size[1] / (x1 - x0), size[0] / (y1 - y0)])
    return np.tile(scale, 2), np.array([x0, y0, x0, y0])


def _lerp(draw: ArrayLike, low: ArrayLike, high: ArrayLike) -> Array:
    weight = np.asarray(draw, np.float64)
    return np.asarray(low) + weight * (np.asarray(high) - np.asarray(low))
