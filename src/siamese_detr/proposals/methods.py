"""Class-agnostic boxes of one image: EdgeBoxes, Selective Search, random boxes (METHOD: the paper's section 3.1).

EdgeBoxes (Zitnick and Dollar, ECCV 2014) scores a window by the edge groups that lie wholly inside it. The paper fed it
the edges of a learned detector whose model file no package carries; here thinned gradients serve, unless such a file is
given. OpenCV's defaults (windows 0.65 IoU apart, near-duplicates up to 0.75 kept) cost most of the time and fill the
best places with copies of the same box: on a smaller, smoothed image, with windows further apart and near-duplicates
put last, the best 30 and 100 boxes find more objects in a fraction of the time (``benchmarks/proposals.py`` measures
both in one run).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from siamese_detr.errors import UserError

MAX_ASPECT = 8.0
MIN_SHORT_SIDE = 48
_LEAST_RESULTS = 512  # asked of OpenCV, so that distinct ones can be found among them
_LEAST_GRADIENT = 0.1  # of 0..1020: below it is rounding, not an edge (a step of one grey level gives about 1)
SELECTIVE_SEARCH_FAST_SIDE = 128
SELECTIVE_SEARCH_FULL_SIDE = 500


@dataclass(frozen=True, slots=True)
class Proposals:
    """Boxes of one image, best first.

    Attributes:
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels of the image given, inside it, of positive size.
        scores: float32 (N,), not increasing; comparable within an image only.
        origin: "image"; "enhanced" if boxes were only found after sharpening and enlarging; "centre" if none were found
            and the one box is the centred one of half the width and height (score 0).
    """

    boxes: np.ndarray
    scores: np.ndarray
    origin: Literal["image", "enhanced", "centre"] = "image"


@dataclass(frozen=True, slots=True)
class EdgeBoxesSettings:
    """Where EdgeBoxes looks, and how near two results may be.

    Attributes:
        side: the image is shrunk to this long side in pixels (never enlarged); None leaves it.
        blur: standard deviation in pixels of a Gaussian before gradients are taken; 0: none. Texture costs most of the
            time and is seldom an object's outline.
        alpha: IoU of neighbouring windows of the search: time grows steeply with it.
        beta: of two results with a larger IoU than this only the better stays.
        distinct: results with no better one of a larger IoU than this come first, their near-duplicates after them all.
        min_area: smallest box, as a fraction of the image's area.
    """

    side: int | None = 200
    blur: float = 1.3
    alpha: float = 0.55
    beta: float = 0.75
    distinct: float = 0.5
    min_area: float = 0.005


def edge_boxes(
    image: np.ndarray,
    max_boxes: int = 512,
    model: str | None = None,
    settings: EdgeBoxesSettings | None = None,
) -> Proposals:
    """EdgeBoxes of an image.

    An image without any is sharpened, enlarged and tried again; the last resort is the centred box.

    Args:
        image: uint8 (H, W, 3), RGB.
        max_boxes: at most so many, the best.
        model: path of OpenCV's structured-forest edge model (``model.yml.gz``); None: thinned gradients.
        settings: of the search.

    Raises:
        UserError: the model cannot be loaded.
    """
    settings = settings or EdgeBoxesSettings()
    height, width = image.shape[:2]
    small = _shrunk(image, settings.side)
    found = _search_edges(small, max_boxes, model, settings)
    origin: Literal["image", "enhanced"] = "image"
    if found is None:
        found, small = _search_enhanced(small, max_boxes, model, settings)
        origin = "enhanced"
    if found is None:
        return _centre(width, height)
    boxes, scores = found
    boxes = _inside(boxes * _scale(width, height, small), width, height)
    return Proposals(boxes, scores, origin)


def selective_search(image: np.ndarray, mode: str = "fast", max_boxes: int = 512) -> Proposals:
    """Selective Search (Uijlings et al., IJCV 2013), OpenCV's "fast" set of strategies, largest grouping first.

    Args:
        image: uint8 (H, W, 3), RGB.
        mode: "fast" shrinks the image to 128x128 pixels first, as DETReg does; "full" to a long side of 500 at most.
        max_boxes: at most so many, the first.

    Raises:
        ValueError: unknown mode.
    """
    height, width = image.shape[:2]
    if mode == "fast":
        side = SELECTIVE_SEARCH_FAST_SIDE
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    elif mode == "full":
        small = _shrunk(image, SELECTIVE_SEARCH_FULL_SIDE)
    else:
        raise ValueError(f"selective search mode {mode!r}: 'fast' or 'full'")
    _seed_c_library()
    search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
    search.setBaseImage(np.ascontiguousarray(small[:, :, ::-1]))
    search.switchToSelectiveSearchFast()
    xywh = np.asarray(search.process(), np.float64).reshape(-1, 4)[:max_boxes]
    if not len(xywh):
        return _centre(width, height)
    boxes = _inside(_corners(xywh) * _scale(width, height, small), width, height)
    return Proposals(boxes, _by_rank(len(boxes)))


def random_boxes(width: int, height: int, generator: np.random.Generator, count: int = 100) -> Proposals:
    """Boxes between two uniform points, of sides at least 1/32 of the image's and aspect ratio at most 8: an ablation.

    Args:
        width, height: the image's size in pixels.
        generator: makes them reproducible.
        count: how many.
    """
    boxes = np.empty((0, 4))
    while len(boxes) < count:
        x = np.sort(generator.uniform(0, width, (2 * count, 2)), axis=1)
        y = np.sort(generator.uniform(0, height, (2 * count, 2)), axis=1)
        w, h = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
        good = (w >= width / 32) & (h >= height / 32) & (np.maximum(w, h) <= MAX_ASPECT * np.minimum(w, h))
        # An extreme panorama may hardly have such boxes; then any aspect ratio will do.
        good = good if good.any() else (w > 0) & (h > 0)
        boxes = np.concatenate([boxes, np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)[good]])
    return Proposals(_inside(boxes[:count], width, height), _by_rank(count))


def check_model(model: str) -> None:
    """Raise `UserError` unless ``model`` is a structured-forest edge model that OpenCV can load."""
    _forest(model)


def _search_edges(
    image: np.ndarray, max_boxes: int, model: str | None, settings: EdgeBoxesSettings
) -> tuple[np.ndarray, np.ndarray] | None:
    """Boxes float64 (N, 4) xyxy in pixels of ``image`` and scores float32 (N,), or None."""
    edges, orientation = _gradient_edges(image, settings.blur) if model is None else _forest_edges(image, model)
    if not edges.any():
        return None
    search = cv2.ximgproc.createEdgeBoxes(
        alpha=settings.alpha,
        beta=settings.beta,
        maxBoxes=max(max_boxes, _LEAST_RESULTS),
        minBoxArea=max(settings.min_area * edges.size, 16.0),
    )
    found, scores = search.getBoundingBoxes(edges, orientation)
    xywh = np.asarray(found, np.float64).reshape(-1, 4)
    scores = np.asarray(scores, np.float32).reshape(-1)
    kept = np.flatnonzero((xywh[:, 2:] > 0).all(1) & np.isfinite(scores) & (scores > 0))
    kept = kept[np.argsort(-scores[kept], kind="stable")]
    if not len(kept):
        return None
    order, scores = _distinct_first(xywh[kept], scores[kept], settings.distinct)
    return _corners(xywh[kept][order[:max_boxes]]), scores[:max_boxes]


def _distinct_first(xywh: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Move near-duplicates behind all others, their scores scaled to below the others', so that the order is theirs.

    Args:
        xywh: float64 (N, 4), best first.
        scores: float32 (N,), positive.
        threshold: IoU above which the worse of two boxes is a near-duplicate.
    """
    ranks = _by_rank(len(xywh))  # no ties, so that the outcome does not hang on the sorting in OpenCV
    first = np.sort(np.asarray(cv2.dnn.NMSBoxes(xywh.tolist(), ranks.tolist(), 0.0, threshold), np.int64).reshape(-1))
    rest = np.setdiff1d(np.arange(len(xywh)), first)
    if len(rest):
        least = scores[first[-1]]
        behind = np.minimum(scores[rest] * min(1.0, least / scores[rest[0]]), least)  # rounding may have raised it
        scores = np.concatenate([scores[first], behind])
    return np.concatenate([first, rest]), scores.astype(np.float32)


def _search_enhanced(
    image: np.ndarray, max_boxes: int, model: str | None, settings: EdgeBoxesSettings
) -> tuple[tuple[np.ndarray, np.ndarray] | None, np.ndarray]:
    """The second try; also gives the image that its boxes refer to."""
    factor = max(2.0, (settings.side or 320) / max(image.shape[:2]))
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    blurred = cv2.GaussianBlur(large, (0, 0), 3)
    large = cv2.addWeighted(large, 3.0, blurred, -2.0, 0)
    return _search_edges(large, max_boxes, model, settings), large


def _gradient_edges(image: np.ndarray, blur: float) -> tuple[np.ndarray, np.ndarray]:
    """Thinned edges float32 (H, W) in [0, 1] and the direction of their normals, float32 (H, W) in [0, pi)."""
    grey = np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.float32)
    if blur > 0:
        grey = np.asarray(cv2.GaussianBlur(grey, (0, 0), blur))
    dx, dy = np.asarray(cv2.Sobel(grey, cv2.CV_32F, 1, 0)), np.asarray(cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    magnitude, angle = (np.asarray(part) for part in cv2.cartToPolar(dx, dy))
    strongest = float(magnitude.max())
    if strongest < _LEAST_GRADIENT:
        return np.zeros_like(grey), np.zeros_like(grey)
    thin = _thinned(magnitude / strongest, dx, dy)
    return thin, np.mod(angle, np.float32(np.pi))


def _thinned(magnitude: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Keep a pixel only where it is not weaker than its two neighbours across the edge (nearest of four directions)."""
    padded = cv2.copyMakeBorder(magnitude, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    height, width = magnitude.shape

    def neighbour(down: int, right: int) -> np.ndarray:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across, along = np.abs(dx), np.abs(dy)
    tangent = np.float32(np.tan(np.pi / 8))
    horizontal, vertical, falling = along <= tangent * across, across <= tangent * along, dx * dy > 0
    strongest_beside = np.where(falling, _pair(neighbour, 1, 1), _pair(neighbour, -1, 1))
    strongest_beside = np.where(vertical, _pair(neighbour, 1, 0), strongest_beside)
    strongest_beside = np.where(horizontal, _pair(neighbour, 0, 1), strongest_beside)
    return np.where(magnitude >= strongest_beside, magnitude, np.float32(0))


def _pair(neighbour, down: int, right: int) -> np.ndarray:
    return np.maximum(neighbour(down, right), neighbour(-down, -right))


@functools.lru_cache(maxsize=2)
def _forest(model: str):
    if not os.path.isfile(model):
        raise UserError(f"edge model {model} does not exist; leave it out to use gradient edges")
    try:
        return cv2.ximgproc.createStructuredEdgeDetection(model)
    except cv2.error as error:
        raise UserError(
            f"edge model {model}: OpenCV cannot load it ({' '.join(str(error.err or error).split())[:100]}); "
            "give opencv_extra's model.yml.gz, or leave it out to use gradient edges"
        ) from error


def _forest_edges(image: np.ndarray, model: str) -> tuple[np.ndarray, np.ndarray]:
    forest = _forest(model)
    edges = forest.detectEdges(image.astype(np.float32) / 255)
    orientation = forest.computeOrientation(edges)
    return forest.edgesNms(edges, orientation), orientation


def _seed_c_library() -> None:
    """OpenCV draws the order within a level of the grouping with C's rand(): seeded, it is the image's alone.

    Where Python cannot reach the C library OpenCV uses (Windows), the boxes are the same, their order is not.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).srand(0)


def _shrunk(image: np.ndarray, side: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    if side is None:
        return image
    # A panorama keeps some height, or nothing would be left to find.
    factor = max(side / max(height, width), MIN_SHORT_SIDE / min(height, width))
    if factor >= 1:
        return image
    size = (round(width * factor), round(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _scale(width: int, height: int, small: np.ndarray) -> np.ndarray:
    x, y = width / small.shape[1], height / small.shape[0]
    return np.array([x, y, x, y])


def _corners(xywh: np.ndarray) -> np.ndarray:
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def _inside(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)


def _by_rank(count: int) -> np.ndarray:
    """Scores for methods that only have an order."""
    return (1 - np.arange(count) / max(count, 1)).astype(np.float32)


def _centre(width: int, height: int) -> Proposals:
    box = [[0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height]]
    return Proposals(np.array(box, np.float32), np.zeros(1, np.float32), "centre")
