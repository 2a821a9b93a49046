"""Class-agnostic boxes of one image: EdgeBoxes, Selective Search, random boxes (paper, section 3.1).

A new method is a class and a row in `METHODS`.

EdgeBoxes (Zitnick and Dollar, ECCV 2014) scores a window by the edge groups that lie wholly inside it. The paper used
the edges of a learned detector whose model file no package ships; here thinned gradients serve, unless such a file is
given. OpenCV's defaults (windows 0.65 IoU apart, near-duplicates up to 0.75 kept) cost most of the time and fill the
best places with copies of the same box. On a smaller, smoothed image, with windows further apart and near-duplicates
put last, the best 30 and 100 boxes find more objects in a fraction of the time (``benchmarks/proposals.py`` measures
both in one run).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from siamese_detr import plugins
from siamese_detr.config import nearest, validate
from siamese_detr.errors import UserError
from siamese_detr.randomness import rng

MIN_SIDE = 16
"""Images with a shorter side, in pixels, have no proposals."""
_MIN_SHORT_SIDE = 48
_MAX_ASPECT = 8.0
_LEAST_RESULTS = 512  # asked of OpenCV, so that distinct ones can be found among them
_LEAST_GRADIENT = 0.1  # of 0..1020: below it is rounding, not an edge (a step of one grey level gives about 1)


@dataclass(frozen=True)
class Method(ABC):
    """A way to compute boxes. A subclass is a frozen dataclass: its fields are the options, named as on the command
    line. Results must depend on these, the image and its path alone.

    Attributes:
        max_boxes: at most so many per image, best first.
    """

    max_boxes: int = 512

    @property
    def min_side(self) -> int | None:
        """Shortest side in pixels that an image need have: large JPEGs are decoded faster at a fraction of their size.
        None: always decode the full size.
        """
        return None

    def parameters(self) -> dict[str, Any]:
        """What the boxes depend on, as JSON values: a store holds boxes of equal parameters only.

        Raises:
            UserError: an option that cannot work.
        """
        return dataclasses.asdict(self)

    @abstractmethod
    def boxes(self, image: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
        """The boxes of an image. An image for which none are found gets the centred box of half its width and height.

        Args:
            image: uint8 (H, W, 3), RGB, both sides at least 16 pixels unless the image was decoded smaller.
            path: of the image, relative to the folder of images; a seed for random numbers, for instance.

        Returns:
            boxes: float32 (N, 4), x1 y1 x2 y2 in pixels of ``image``, inside it, of positive size, best first.
            scores: float32 (N,), not increasing; comparable within an image only.
        """


@dataclass(frozen=True)
class EdgeBoxes(Method):
    """EdgeBoxes. An image without any is sharpened, enlarged and tried again.

    Attributes:
        edge_model: path of OpenCV's structured-forest edge model (``model.yml.gz``); None: thinned gradients.
        side: the image is shrunk to this long side in pixels (never enlarged); None keeps its size.
        blur: standard deviation in pixels of a Gaussian before gradients are taken; 0: none. Texture costs most of the
            time and is seldom an object's outline.
        alpha: IoU of neighbouring windows of the search: time grows steeply with it.
        beta: of two results with a larger IoU than this only the better stays.
        distinct: results with no better one of a larger IoU than this come first, their near-duplicates after them all.
        min_area: smallest box, as a fraction of the image's area.
    """

    edge_model: str | None = None
    side: int | None = 200
    blur: float = 1.3
    alpha: float = 0.55
    beta: float = 0.75
    distinct: float = 0.5
    min_area: float = 0.005

    @property
    def min_side(self) -> int | None:
        return self.side

    def parameters(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        del values["edge_model"]
        if self.edge_model is None:
            return values | {"edges": "gradients"}
        _forest(self.edge_model)
        return values | {"edges": f"model {hashlib.sha256(Path(self.edge_model).read_bytes()).hexdigest()[:16]}"}

    def boxes(self, image: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        small = _shrunk(image, self.side)
        boxes, scores = self._search(small)
        if not len(boxes):
            small = self._enhanced(small)
            boxes, scores = self._search(small)
        return _inside(boxes * _scale(width, height, small), width, height), scores

    def _search(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes float64 (N, 4), x1 y1 x2 y2 in pixels of ``image``, and scores float32 (N,)."""
        model = self.edge_model
        edges, orientation = _gradient_edges(image, self.blur) if model is None else _forest_edges(image, model)
        if not edges.any():
            return np.zeros((0, 4)), np.zeros(0, np.float32)
        search = cv2.ximgproc.createEdgeBoxes(
            alpha=self.alpha,
            beta=self.beta,
            maxBoxes=max(self.max_boxes, _LEAST_RESULTS),
            minBoxArea=max(self.min_area * edges.size, 16.0),
        )
        results, scores = search.getBoundingBoxes(edges, orientation)
        xywh = np.asarray(results, np.float64).reshape(-1, 4)
        scores = np.asarray(scores, np.float32).reshape(-1)
        kept = np.flatnonzero((xywh[:, 2:] > 0).all(1) & np.isfinite(scores) & (scores > 0))
        kept = kept[np.argsort(-scores[kept], kind="stable")]
        order, scores = _distinct_first(xywh[kept], scores[kept], self.distinct)
        return _corners(xywh[kept][order[: self.max_boxes]]), scores[: self.max_boxes]

    def _enhanced(self, image: np.ndarray) -> np.ndarray:
        """The image enlarged and sharpened."""
        factor = max(2.0, (self.side or 320) / max(image.shape[:2]))
        size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
        large = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
        return cv2.addWeighted(large, 3.0, cv2.GaussianBlur(large, (0, 0), 3), -2.0, 0)


@dataclass(frozen=True)
class SelectiveSearch(Method):
    """Selective Search (Uijlings et al., IJCV 2013), OpenCV's "fast" set of strategies, largest grouping first.

    Attributes:
        mode: "fast" shrinks the image to 128x128 pixels first, as DETReg does; "full" to a long side of 500 at most.
    """

    mode: Literal["fast", "full"] = "fast"

    @property
    def min_side(self) -> int:
        return 128 if self.mode == "fast" else 500

    def boxes(self, image: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        if self.mode == "fast":
            small = cv2.resize(image, (self.min_side, self.min_side), interpolation=cv2.INTER_AREA)
        else:
            small = _shrunk(image, self.min_side)
        _seed_c_library()
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(np.ascontiguousarray(small[:, :, ::-1]))
        search.switchToSelectiveSearchFast()
        xywh = np.asarray(search.process(), np.float64).reshape(-1, 4)[: self.max_boxes]
        boxes = _inside(_corners(xywh) * _scale(width, height, small), width, height)
        return boxes, _by_rank(len(boxes))


@dataclass(frozen=True)
class RandomBoxes(Method):
    """Boxes between two uniform points, of sides at least 1/32 of the image's and aspect ratio at most 8: an ablation.
    At most 100.

    Attributes:
        seed: with an image's path, it determines the image's boxes.
    """

    seed: int = 0

    @property
    def min_side(self) -> int:
        return MIN_SIDE  # the image need only be one that can be decoded

    def boxes(self, image: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        count = min(self.max_boxes, 100)
        generator = rng(self.seed, zlib.crc32(path.encode()))
        boxes = np.empty((0, 4))
        while len(boxes) < count:
            x = np.sort(generator.uniform(0, width, (2 * count, 2)), axis=1)
            y = np.sort(generator.uniform(0, height, (2 * count, 2)), axis=1)
            w, h = x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]
            good = (w >= width / 32) & (h >= height / 32) & (np.maximum(w, h) <= _MAX_ASPECT * np.minimum(w, h))
            # An extreme panorama may hardly have such boxes; then any aspect ratio will do.
            good = good if good.any() else (w > 0) & (h > 0)
            boxes = np.concatenate([boxes, np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1)[good]])
        return _inside(boxes[:count], width, height), _by_rank(count)


METHODS: dict[str, type[Method]] = {
    "edge-boxes": EdgeBoxes,
    "selective-search": SelectiveSearch,
    "random": RandomBoxes,
}


def find_method(name: str) -> type[Method]:
    """The class of a method: one of `METHODS`, or what another package's entry point of that name in the group
    ``siamese_detr.proposals`` names.

    Raises:
        UserError: there is none of that name, among ours or among the plug-ins.
    """
    if name in METHODS:
        return METHODS[name]
    known = METHODS | plugins.load("siamese_detr.proposals")
    if name not in known:
        raise UserError(
            f"unknown proposal method {name!r}{nearest(name, [*known])}; the methods are {', '.join(known)}"
        )
    return known[name]


def make_method(name: str, shared: Mapping[str, Any], own: Mapping[str, Any]) -> Method:
    """A method with its options.

    Args:
        name: of the method.
        shared: options that several methods have; those this one lacks are left out.
        own: options of this method alone.

    Raises:
        UserError: unknown name, or an option in ``own`` that the method lacks, or of the wrong type.
    """
    kind = find_method(name)
    names = {field.name for field in dataclasses.fields(kind)}
    options = {option: value for option, value in shared.items() if option in names}
    return validate(kind, options | dict(own), f"the options of {name}")


def _distinct_first(xywh: np.ndarray, scores: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """An order with near-duplicates behind all others, and scores with theirs scaled down to fit that order.

    Args:
        xywh: float64 (N, 4), best first.
        scores: float32 (N,), positive.
        threshold: IoU above which the worse of two boxes is a near-duplicate.
    """
    ranks = _by_rank(len(xywh))  # no ties, so that the result does not depend on OpenCV's sorting
    first = np.sort(np.asarray(cv2.dnn.NMSBoxes(xywh.tolist(), ranks.tolist(), 0.0, threshold), np.int64).reshape(-1))
    rest = np.setdiff1d(np.arange(len(xywh)), first)
    if len(rest):
        least = scores[first[-1]]
        behind = np.minimum(scores[rest] * min(1.0, least / scores[rest[0]]), least)  # rounding may have raised it
        scores = np.concatenate([scores[first], behind])
    return np.concatenate([first, rest]), scores.astype(np.float32)


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

    def strongest(down: int, right: int) -> np.ndarray:
        """The stronger of the two neighbours in a direction and its opposite."""
        ahead = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        return np.maximum(ahead, padded[1 - down : 1 - down + height, 1 - right : 1 - right + width])

    across, along = np.abs(dx), np.abs(dy)
    tangent = np.float32(np.tan(np.pi / 8))
    horizontal, vertical, falling = along <= tangent * across, across <= tangent * along, dx * dy > 0
    diagonal = np.where(falling, strongest(1, 1), strongest(-1, 1))
    beside = np.select([horizontal, vertical], [strongest(0, 1), strongest(1, 0)], diagonal)
    return np.where(magnitude >= beside, magnitude, np.float32(0))


@functools.lru_cache(maxsize=2)
def _forest(model: str) -> Any:
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
    """OpenCV orders the groups of one level by C's rand(). Seeded, the order depends on the image alone.

    Where Python cannot reach the C library that OpenCV uses (Windows), the boxes are the same in another order.
    """
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).srand(0)


def _shrunk(image: np.ndarray, side: int | None) -> np.ndarray:
    height, width = image.shape[:2]
    if side is None:
        return image
    # A panorama keeps some height, or nothing would be left to find.
    factor = max(side / max(height, width), _MIN_SHORT_SIDE / min(height, width))
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
