"""What is wrong with labels, and turning tables of boxes into a clean `DetectionDataset`'s images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.decode import read_orientation, read_size

MAX_EXAMPLES = 5
CLIP_TOLERANCE = 1.0
"""Boxes that leave the image by no more than this many pixels are clipped without a report: it is rounding."""
MIN_BOX_SIDE = 0.01
"""Boxes thinner than this many pixels inside the image count as empty."""

ACTIONS = {
    "images not listed": "left out",
    "malformed image entry": "left out",
    "file name written differently": "the one file is taken that can be meant",
    "file name in the XML differs from the XML's": "the picture of the XML's own name is taken, where there is one",
    "one file under several image ids": "one image with the boxes of all",
    "duplicate image id": "the repeated entry is left out; where the files differ, all with that id",
    "missing image": "left out",
    "unreadable image": "left out",
    "unreadable label file": "its image is left out, not taken for one without objects",
    "malformed box": "dropped",
    "box of an unknown image": "dropped",
    "box of an unknown class": "dropped",
    "wrong size in the labels": "the picture's own size is used, which all of its boxes fit",
    "labels of the picture before its EXIF turn": "boxes are turned with the picture",
    "labels of a larger or smaller copy": "boxes are scaled to the picture",
    "labels of a picture of another shape": "left out: it was turned, cropped or exchanged since",
    "repeated box": "dropped",
    "duplicate annotation id": "kept and renumbered, as its box is another one",
    "box of zero size": "dropped",
    "box outside the image": "dropped",
    "box partly outside the image": "clipped to the image",
    "image ids are no integers, or very large": "renumbered from 1",
    "repeated class name": "kept apart, the id appended to the name",
    "malformed class": "left out with its boxes",
    "class that only groups others": "left out: it has no boxes",
    "decimal comma": "read as a decimal point",
    "number after the box": "passed over: a track, neither a corner nor a score",
    "missing label file": "taken for an image without objects",
    "image in several label sources": "one image with the boxes of all; of pseudo-labels only if there are no others",
}
"""Each kind of fault, and what is done about it."""


@dataclass
class Problem:
    """Faults of one kind.

    Args:
        kind: what is wrong.
        action: what reading did, or what a run would do, about them.
        count: how many.
        examples: the first few, each naming what is affected.
        where: the part of the data that has them, where there are several (``data``, ``val``, ``data and val``).
    """

    kind: str
    action: str
    count: int = 0
    examples: list[str] = field(default_factory=list)
    where: str = ""

    def __str__(self) -> str:
        """One line: two examples show what is meant, and ``check`` shows more."""
        shown = self.examples[:2]
        return f"{self.kind}: {self.count} ({self.action}): {', '.join(shown)}{', …' * (self.count > len(shown))}"


class Problems:
    """Counts faults by kind, keeping a few examples of each."""

    def __init__(self) -> None:
        self._by_kind: dict[str, Problem] = {}

    def add(self, kind: str, example: str) -> None:
        """Count one fault."""
        problem = self._by_kind.setdefault(kind, Problem(kind, ACTIONS[kind]))
        problem.count += 1
        if len(problem.examples) < MAX_EXAMPLES:
            problem.examples.append(example if len(example) <= 200 else example[:200] + "...")

    def add_where(self, kind: str, where: np.ndarray, example: Callable[[int], str]) -> None:
        """Count one fault for each true element of the mask ``where``."""
        indices = np.flatnonzero(where)
        for index in indices[:MAX_EXAMPLES]:
            self.add(kind, example(int(index)))
        if len(indices) > MAX_EXAMPLES:
            self._by_kind[kind].count += len(indices) - MAX_EXAMPLES

    def as_list(self) -> list[Problem]:
        """All problems, in the order in which their kinds are documented."""
        return [self._by_kind[kind] for kind in ACTIONS if kind in self._by_kind]

    def summary(self) -> str:
        """The first three kinds, for the line that says why nothing is left."""
        return "; ".join(map(str, self.as_list()[:3]))


@dataclass
class LabelTables:
    """What the readers of the formats hand on: a table of images and one of boxes, not yet checked against each other.

    Args:
        paths: absolute file of each image.
        ids: number of each image.
        sizes: (width, height) of each image; (0, 0) where the labels do not give it.
        class_names: names by class index.
        category_ids: the file's own id of each class.
        owners: for each box, the index of its image.
        classes: for each box, the index of its class.
        boxes: for each box, four finite numbers in that ``convention``, in pixels, or in parts of the image's size if
            ``normalised``.
        crowd: for each box, whether it is a crowd or otherwise not to be judged.
        areas: for each box, the object's area in pixels; NaN for the box's own.
        scores: for each box, the score of the detector that found it; NaN for a label by hand.
        convention: "xyxy" (two corners), "xywh" (a corner, width and height) or "cxcywh" (the centre instead).
    """

    paths: list[str]
    ids: list[int]
    sizes: list[tuple[int, int]]
    class_names: list[str]
    category_ids: list[int]
    owners: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    boxes: list[Sequence[float]] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    normalised: bool = False
    convention: str = "xyxy"


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image with its boxes.

    Args:
        id: number, unique in its dataset.
        path: absolute file.
        width: pixels.
        height: pixels.
        boxes: float32 (N, 4), xyxy in pixels, inside the image, none empty.
        classes: int64 (N,), from 0.
        crowd: bool (N,), COCO's ``iscrowd`` or VOC's ``difficult``: not trained on, ignored by evaluation.
        areas: float32 (N,), the objects' areas in square pixels as the labels give them, else the boxes'.
        scores: float32 (N,), of pseudo-labels the score in [0, 1] that the detector gave them; NaN for labels by hand.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    scores: np.ndarray


def assemble(tables: LabelTables, problems: Problems, source: Path) -> list[LabelledImage]:
    """Check boxes against images, drop or clip what does not fit (counted in ``problems``), and group boxes by image.

    Images keep their order; files that are not there, or whose header cannot be read, are left out.

    Raises:
        UserError: many boxes of ``source`` do not fit, and all fit if they are read in another convention.
    """
    present = _present(tables.paths)
    problems.add_where("missing image", ~present, lambda i: tables.paths[i])
    given = np.array(tables.sizes, dtype=np.int64).reshape(-1, 2)
    pictures = _picture_sizes(tables.paths, given, present, problems)
    sizes = np.where(given.min(1, keepdims=True, initial=1) > 0, given, pictures)
    owners = np.array(tables.owners, dtype=np.int64)
    numbers = np.array(tables.boxes, dtype=np.float64).reshape(-1, 4)
    _check_convention(tables, numbers, owners, sizes, pictures, present[owners], source)
    boxes = corners(numbers, tables.convention)
    if tables.normalised:
        boxes *= sizes[owners][:, [0, 1, 0, 1]]
    else:
        _compare_sizes(tables.paths, sizes, pictures, present, owners, boxes, problems)
    bounds = sizes[owners][:, [0, 1, 0, 1]].astype(np.float64)
    relevant = present[owners]
    inside = np.clip(boxes, 0, bounds)
    zero = relevant & ~(boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)
    outside = relevant & ~zero & ~(inside[:, 2:] - inside[:, :2] >= MIN_BOX_SIDE).all(1)
    clipped = relevant & ~zero & ~outside & (np.abs(boxes - inside) > CLIP_TOLERANCE).any(1)

    def example(i: int) -> str:
        text = ", ".join(f"{v:g}" for v in boxes[i])
        return f"{tables.paths[owners[i]]} [{text}] in {bounds[i, 0]:g}x{bounds[i, 1]:g}"

    problems.add_where("box of zero size", zero, example)
    problems.add_where("box outside the image", outside, example)
    problems.add_where("box partly outside the image", clipped, example)

    rows = np.flatnonzero(relevant & ~zero & ~outside)
    rows = rows[np.argsort(owners[rows], kind="stable")]
    inside = inside[rows].astype(np.float32)
    classes = np.array(tables.classes, dtype=np.int64)[rows]
    crowd = np.array(tables.crowd, dtype=bool)[rows]
    areas = np.array(tables.areas, dtype=np.float32)[rows]
    own = (inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1])
    areas = np.where(areas > 0, areas, own)
    scores = np.array(tables.scores, dtype=np.float32)[rows]
    ends = np.searchsorted(owners[rows], np.arange(len(sizes) + 1))
    images = []
    for i in np.flatnonzero(present):
        part = slice(ends[i], ends[i + 1])
        width, height = sizes[i].tolist()
        columns = (inside[part], classes[part], crowd[part], areas[part], scores[part])
        images.append(LabelledImage(tables.ids[i], Path(tables.paths[i]), width, height, *columns))
    return images


def corners(numbers: np.ndarray, convention: str) -> np.ndarray:
    """Boxes (n, 4) as xyxy, from any convention of `LabelTables`."""
    first, second = numbers[:, :2], numbers[:, 2:]
    if convention == "xyxy":
        return numbers.copy()
    low = first if convention == "xywh" else first - second / 2
    return np.concatenate([low, low + second], 1)


CONVENTIONS = {
    "xyxy": "two corners, x1 y1 x2 y2",
    "xywh": "a corner, width and height, x y w h",
    "cxcywh": "centre, width and height, cx cy w h",
    "exchanged": "two corners in any order",
}
UNITS = {False: "in pixels", True: "in parts of the image's size"}
SUSPICIOUS = 0.2
"""If more than this share of all boxes does not fit its image, perhaps they were written in another convention."""


def _check_convention(
    tables: LabelTables,
    numbers: np.ndarray,
    owners: np.ndarray,
    sizes: np.ndarray,
    pictures: np.ndarray,
    relevant: np.ndarray,
    source: Path,
) -> None:
    """Raise `UserError` if boxes were clearly written in another convention than the file's form asks for."""

    def fits(convention: str, normalised: bool, sizes: np.ndarray) -> np.ndarray:
        bounds = sizes[owners][:, [0, 1, 0, 1]].astype(np.float64)
        if convention == "exchanged":
            both = numbers[:, :2], numbers[:, 2:]
            boxes = np.concatenate([np.minimum(*both), np.maximum(*both)], 1)
        else:
            boxes = corners(numbers, convention)
        boxes = boxes * bounds if normalised else boxes
        slack = np.maximum(CLIP_TOLERANCE, 0.01 * bounds)
        thick = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)
        return thick & (boxes >= -slack).all(1) & (boxes <= bounds + slack).all(1)

    own = (tables.convention, tables.normalised)
    wrong = relevant & ~fits(*own, sizes) & ~fits(*own, pictures)
    if wrong.sum() < 3 or wrong.sum() < SUSPICIOUS * relevant.sum():
        return
    others = [(name, unit) for unit in (own[1], not own[1]) for name in CONVENTIONS if (name, unit) != own]
    # Only of a form with two corners can these be exchanged; else any box of no size would fit so.
    others = [(name, unit) for name, unit in others if name != "exchanged" or own[0] == "xyxy"]
    possible = [(name, unit) for name, unit in others if fits(name, unit, sizes)[relevant].all()]
    if possible:
        fitting = [f"{CONVENTIONS[name]} {UNITS[unit]}" for name, unit in possible]
        raise UserError(
            f"{source}: {wrong.sum()} of {relevant.sum()} boxes do not fit their image as {CONVENTIONS[own[0]]} "
            f"{UNITS[own[1]]}, which this form of labels asks for; all fit as {' or as '.join(fitting)}: convert the "
            "boxes"
        )


def _picture_sizes(paths: Sequence[str], given: np.ndarray, present: np.ndarray, problems: Problems) -> np.ndarray:
    """int64 (n, 2): width and height of each picture, upright, from its header; of one that cannot be read, the size
    given. Without that, too, the image is left out: changes ``present``."""
    sizes = np.maximum(given, 1)
    wanted = np.flatnonzero(present).tolist()
    for index, size in zip(wanted, _header_sizes([paths[i] for i in wanted]), strict=True):
        if not isinstance(size, ImageError):
            sizes[index] = size
        elif (given[index] <= 0).any():
            present[index] = False
            problems.add("unreadable image", f"{size.path}: {size.reason}")
    return sizes


def _compare_sizes(
    paths: Sequence[str],
    sizes: np.ndarray,
    pictures: np.ndarray,
    present: np.ndarray,
    owners: np.ndarray,
    boxes: np.ndarray,
    problems: Problems,
) -> None:
    """Two sources of one fact: the size in the labels, and the picture's. Changes ``sizes``, ``boxes`` and
    ``present``."""
    order = np.argsort(owners, kind="stable")
    ends = np.searchsorted(owners[order], np.arange(len(sizes) + 1))
    for i in np.flatnonzero(present & (sizes != pictures).any(1)).tolist():
        (width, height), (own_width, own_height) = sizes[i].tolist(), pictures[i].tolist()
        text = f"{paths[i]}: {width}x{height}, the picture is {own_width}x{own_height}"
        its = order[ends[i] : ends[i + 1]]
        low, high = boxes[its].min(initial=0.0), boxes[its].reshape(-1, 2, 2).max((0, 1), initial=0.0)
        leaves = low < -CLIP_TOLERANCE or (high > sizes[i] + CLIP_TOLERANCE).any()
        orientation = read_orientation(paths[i]) if (width, height) == (own_height, own_width) else 1
        if leaves and low >= -CLIP_TOLERANCE and (high <= pictures[i] + CLIP_TOLERANCE).all():
            problems.add("wrong size in the labels", text)
            sizes[i] = pictures[i]
        elif orientation >= 5:
            problems.add("labels of the picture before its EXIF turn", text)
            boxes[its] = turned(boxes[its], width, height, orientation)
            sizes[i] = pictures[i]
        elif abs(width * own_height - height * own_width) <= max(width, height, own_width, own_height):
            problems.add("labels of a larger or smaller copy", text)
        else:
            problems.add("labels of a picture of another shape", text)
            present[i] = False


def turned(boxes: np.ndarray, width: int, height: int, orientation: int) -> np.ndarray:
    """Boxes (n, 4) xyxy of stored pixels, in the upright picture.

    Args:
        boxes: in pixels of the stored picture.
        width, height: of the stored picture.
        orientation: its EXIF orientation, 5 to 8: those that exchange width and height.
    """
    x1, y1, x2, y2 = boxes.T
    if orientation in (6, 7):
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):
        x1, x2 = width - x2, width - x1
    return np.stack([y1, x1, y2, x2], 1)


def _present(paths: Sequence[str]) -> np.ndarray:
    """Which files exist. Folders from which many files are wanted are listed once, instead of asking file by file."""
    by_folder: dict[str, list[int]] = {}
    for index, path in enumerate(paths):
        by_folder.setdefault(os.path.dirname(path), []).append(index)
    present = np.zeros(len(paths), dtype=bool)
    for folder, indices in by_folder.items():
        if len(indices) < 256:
            present[indices] = [os.path.exists(paths[i]) for i in indices]
            continue
        try:
            names = set(os.listdir(folder))
        except OSError:
            continue
        present[indices] = [os.path.basename(paths[i]) in names for i in indices]
    return present


def _header_sizes(paths: Sequence[str]) -> Iterable[tuple[int, int] | ImageError]:
    def size(path: str) -> tuple[int, int] | ImageError:
        try:
            return read_size(path)
        except ImageError as error:
            return error

    if len(paths) < 32:
        return [size(path) for path in paths]
    with ThreadPoolExecutor(8) as pool:  # waiting for storage, not computing
        return list(pool.map(size, paths, chunksize=64))


def number(value: Any) -> TypeGuard[int | float]:
    """Whether a value from a file is a finite number of sensible magnitude (not a bool, not a string)."""
    return type(value) in (int, float) and -1e9 < value < 1e9


def score(value: Any) -> float:
    """A pseudo-label's score as a file gives it; NaN unless it is a number from 0 to 1."""
    return float(value) if number(value) and 0 <= value <= 1 else float("nan")


def size(width: Any, height: Any) -> tuple[int, int]:
    """An image's size as a file gives it; (0, 0) unless both are numbers of 1 or more: some tools write zeros."""
    return (int(width), int(height)) if number(width) and number(height) and min(width, height) >= 1 else (0, 0)
