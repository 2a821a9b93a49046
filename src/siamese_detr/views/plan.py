"""The plan of a sample: all its random decisions, made without its pixels.

The numbers that decide the views' sizes come from a counter-based stream, which is read for many samples at once:
batches of similar sizes are formed without decoding any image. All other numbers come from ``rng(seed, epoch, index)``.
In both cases, a sample is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from siamese_detr.proposals.shard import StoredImage
from siamese_detr.randomness import rng
from siamese_detr.views import geometry, regions
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.geometry import Array
from siamese_detr.views.photometric import PHOTOMETRIC

UNCHANGED = np.array([1, 1, 1, 0, -1, 0, 0], np.float32)
"""Photometric parameters that change nothing."""
_SHORT, _FLIP, _SWAP, _DIAGONAL, _SHRINK, _PLACE, _TRIES = 0, 1, 2, 3, slice(4, 6), slice(6, 8), 8
_AREA, _ASPECT = slice(_TRIES, _TRIES + geometry.OUTER_TRIES), slice(_TRIES + geometry.OUTER_TRIES, None)
_DRAWS = _TRIES + 2 * geometry.OUTER_TRIES
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class SamplePlan:
    """The rectangles to cut from an image, and its regions.

    Attributes:
        rectangles: float64 (V, 4), what each view shows, pixels of the original image *before* flipping.
        flip: mirror each view after cutting.
        size: (height, width) of every view.
        boxes: float32 (V, P, 4), xyxy pixels of the view.
        query_boxes: float32 (V, P, 4), with jittered edges.
        photometric: float32 (V, 1 + P, K), columns :data:`~siamese_detr.views.photometric.PHOTOMETRIC`.
        padded: number of padding regions (the last ones); those of DETReg have no area.
    """

    rectangles: Array
    flip: bool
    size: tuple[int, int]
    boxes: NDArray[np.float32]
    query_boxes: NDArray[np.float32]
    photometric: NDArray[np.float32]
    padded: int


def uniforms(count: int, seed: int, epoch: ArrayLike, index: ArrayLike) -> Array:
    """Uniform numbers (n, count) in [0, 1), a pure function of (seed, epoch, index) for each of n samples.

    The splitmix64 generator read at position ``index * count`` from a start hashed from seed and epoch.
    """
    epochs, indices = np.broadcast_arrays(np.atleast_1d(epoch), np.atleast_1d(index))
    start = np.empty(len(epochs), np.uint64)
    for one in np.unique(epochs):
        start[epochs == one] = np.random.SeedSequence((seed, int(one))).generate_state(1, np.uint64)[0]
    step = indices.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        state = (start[:, None] + step * _GAMMA).astype(np.uint64)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def view_sizes(
    config: ViewConfig, sizes: ArrayLike, seed: int, epoch: ArrayLike, index: ArrayLike
) -> NDArray[np.int64]:
    """View sizes (n, 2) = (height, width) of n samples, without their images.

    Args:
        sizes: (n, 2) original (width, height).
        epoch, index: (n,) each.
    """
    size = np.asarray(sizes).reshape(-1, 2)
    if config.view_size is not None:
        return np.full((len(size), 2), config.view_size, np.int64)
    draw = uniforms(_DRAWS, seed, epoch, index)
    wanted = geometry.base_sizes(size, _short_sides(config, draw), config.max_size)
    if config.views == "two":
        wanted, _ = geometry.outer_sizes(
            wanted, draw[:, _AREA], draw[:, _ASPECT], config.area_range, config.aspect_range
        )
    return wanted[:, ::-1].copy()


def plan_sample(config: ViewConfig, image: StoredImage, seed: int, epoch: int, index: int) -> SamplePlan:
    """Draw the views and regions of one image (paper, section 3.1; UP-DETR and DETReg: one view of the whole image)."""
    draw = uniforms(_DRAWS, seed, epoch, index)[0]
    original = np.array([image.width, image.height], np.int64)
    base = geometry.base_sizes(original, _short_sides(config, draw[None]), config.max_size)[0]
    scale = np.tile(base / original, 2)
    flip = bool(config.flip and draw[_FLIP] < 0.5)
    pair = _views(config, (int(base[0]), int(base[1])), draw)
    height_width = pair.outer[2:] - pair.outer[:2]
    size = (int(height_width[1]), int(height_width[0])) if config.view_size is None else (config.view_size,) * 2

    random = rng(seed, epoch, index)
    proposals = np.asarray(image.boxes, np.float64).reshape(-1, 4) * scale
    if flip:
        proposals = geometry.mirror(proposals, float(base[0]))
    chosen, padded = _regions(config, pair, size, proposals, np.asarray(image.scores, np.float64), random)

    frame = np.array([0, 0, size[1], size[0]], np.float64)
    boxes = np.stack([geometry.clamp(geometry.to_view(chosen, view, size), frame) for view in pair.views])
    query_boxes = geometry.move_edges(boxes, _offsets(random, boxes.shape, config.box_jitter), frame)
    rectangles = geometry.mirror(pair.views, float(base[0])) if flip else pair.views
    return SamplePlan(
        rectangles=geometry.clamp(rectangles / scale, [0, 0, *original]),
        flip=flip,
        size=size,
        boxes=boxes.astype(np.float32),
        query_boxes=query_boxes.astype(np.float32),
        photometric=_photometric(config, random),
        padded=padded,
    )


def _photometric(config: ViewConfig, random: np.random.Generator) -> NDArray[np.float32]:
    """Parameters (V, 1 + P, K) of a sample: Siamese DETR augments views and crops, UP-DETR and DETReg only crops."""
    parameters = draw_photometric(config, random, (config.num_views, 1 + config.num_regions))
    if config.views != "two":
        parameters[:, 0] = UNCHANGED
    return parameters


def draw_photometric(config: ViewConfig, random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Parameters (*shape, K) of independent photometric augmentations, columns :data:`PHOTOMETRIC`.

    The distributions are torchvision's: factors uniform in 1 +- strength, hue uniform in +-hue, the four operations in
    random order.
    """
    draw = random.random((*shape, 9))
    column = {name: draw[..., i] for i, name in enumerate(PHOTOMETRIC)}
    jittered = draw[..., 7] < config.color_probability
    factors = [
        np.where(jittered, 1 + strength * (2 * column[name] - 1), 1)
        for name, strength in (
            ("brightness", config.brightness),
            ("contrast", config.contrast),
            ("saturation", config.saturation),
        )
    ]
    hue = np.where(jittered, config.hue * (2 * column["hue"] - 1), 0)
    order = np.where(jittered, np.floor(24 * column["order"]), -1)
    gray = column["gray"] < config.gray_probability
    low, high = config.blur_sigma
    sigma = np.where(draw[..., 8] < config.blur_probability, low + (high - low) * column["sigma"], 0)
    return np.stack([*factors, hue, order, gray, sigma], -1).astype(np.float32)


def _short_sides(config: ViewConfig, draw: Array) -> NDArray[np.int64]:
    sides = np.asarray(config.short_sides, np.int64)
    return sides[(draw[:, _SHORT] * len(sides)).astype(np.int64)]


def _views(config: ViewConfig, base: tuple[int, int], draw: Array) -> geometry.ViewPair:
    """The rectangles of all views; a single view is the whole image, and its own intersection."""
    if config.views != "two":
        whole = np.array([0, 0, *base], np.float64)
        return geometry.ViewPair(whole[None], whole, whole)
    outer = geometry.outer_rectangle(
        base, draw[_AREA], draw[_ASPECT], draw[_PLACE], config.area_range, config.aspect_range
    )
    shrink = draw[_SHRINK] if config.shrink else np.zeros(2)
    other = bool(config.diagonals and draw[_DIAGONAL] < 0.5)
    return geometry.view_pair(outer, config.iou, (shrink[0], shrink[1]), bool(draw[_SWAP] > 0.5), other)


def _regions(
    config: ViewConfig,
    pair: geometry.ViewPair,
    size: tuple[int, int],
    proposals: Array,
    scores: Array,
    random: np.random.Generator,
) -> tuple[Array, int]:
    """Regions (P, 4) of the base image and the number of padding ones among them."""
    frame = pair.intersection
    if config.views == "patches":
        patches = regions.random_patches(random.random((config.num_regions, 4)), size)
        return geometry.from_view(patches, pair.views[0], size), 0
    if config.box_source == "random":
        proposals = regions.random_boxes(random.random((regions.RANDOM_CANDIDATES, 4)), frame)
        # Their order is random already, and they score alike.
        scores = np.ones(len(proposals))
    # DETReg takes the best proposals however small; a hair of area keeps degenerate ones out.
    min_area = config.min_area if config.views == "two" else 1.0 / max(float(geometry.areas(frame)), 1.0)
    boxes, scores = regions.candidate_regions(proposals, scores, frame, min_area)
    first = frame[None] if config.views == "two" else np.zeros((0, 4))
    count = config.num_regions - len(first)
    if config.selection == "diverse":
        besides = frame if config.views == "two" else None
        kept = regions.choose_diverse(boxes, scores, count, random.random(len(boxes)), config.duplicate_iou, besides)
    else:
        kept = regions.choose_top(boxes, scores, count)
    padded = count - len(kept)
    if config.views == "proposals":  # DETReg finds what is there: rows without area are not targets
        padding = np.zeros((padded, 4))
    else:
        padding = geometry.pad_regions(kept, frame, _offsets(random, (padded, 4), config.box_jitter))
    return np.concatenate([first, kept, padding]), padded


def _offsets(random: np.random.Generator, shape: tuple[int, ...], jitter: float) -> Array:
    """Edge moves in (-jitter, jitter), distributed as in the paper's code: a sigmoid of normal numbers."""
    return jitter * np.tanh(random.standard_normal(shape) / 2)
