"""What is wrong with labels, and turning tables of boxes into a clean `DetectionDataset`'s images."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from siamese_detr.errors import ImageError
from siamese_detr.images.decode import read_size

MAX_EXAMPLES = 5
CLIP_TOLERANCE = 1.0
"""Boxes that leave the image by no more than this many pixels are clipped without a report: it is rounding."""
MIN_BOX_SIDE = 0.01
"""Boxes thinner than this many pixels inside the image count as empty."""

ACTIONS = {
    "images not listed": "left out",
    "malformed image entry": "left out",
    "duplicate image id": "the repeated entry is left out; where the files differ, all with that id",
    "missing image": "left out",
    "unreadable image": "left out",
    "unreadable label file": "its image is left out, not taken for one without objects",
    "malformed box": "dropped",
    "box of an unknown image": "dropped",
    "box of an unknown class": "dropped",
    "wrong size in the labels": "the picture's own size is used, which all of its boxes fit",
    "size differs from the picture's": "boxes are clipped to the labels' size, then scaled to the picture's; fix it",
    "repeated box": "dropped",
    "duplicate annotation id": "kept and renumbered, as its box is another one",
    "box of zero size": "dropped",
    "box outside the image": "dropped",
    "box partly outside the image": "clipped to the image",
    "image ids are no integers": "renumbered from 1",
    "repeated class name": "kept apart, the id appended to the name",
    "malformed class": "left out with its boxes",
    "missing label file": "taken for an image without objects",
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
        boxes: for each box, finite xyxy in pixels, or in parts of the image's size if ``normalised``.
        crowd: for each box, whether it is a crowd or otherwise not to be judged.
        areas: for each box, the object's area in pixels; NaN for the box's own.
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
    normalised: bool = False


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
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray


def assemble(tables: LabelTables, problems: Problems) -> list[LabelledImage]:
    """Check boxes against images, drop or clip what does not fit (counted in ``problems``), and group boxes by image.

    Images keep their order; files that are not there, or whose size is needed and cannot be read, are left out.
    """
    sizes = np.array(tables.sizes, dtype=np.int64).reshape(-1, 2)
    present = _present(tables.paths)
    problems.add_where("missing image", ~present, lambda i: tables.paths[i])
    unknown = np.flatnonzero(present & (sizes <= 0).any(1))
    for index, size in zip(unknown, _header_sizes([tables.paths[i] for i in unknown]), strict=True):
        if isinstance(size, ImageError):
            present[index] = False
            problems.add("unreadable image", f"{size.path}: {size.reason}")
        else:
            sizes[index] = size

    owners = np.array(tables.owners, dtype=np.int64)
    boxes = np.array(tables.boxes, dtype=np.float64).reshape(-1, 4)
    bounds = sizes[owners][:, [0, 1, 0, 1]].astype(np.float64)
    if tables.normalised:
        boxes *= bounds
    relevant = present[owners]
    if not tables.normalised and _correct_sizes(tables, sizes, owners[relevant], boxes[relevant], problems):
        bounds = sizes[owners][:, [0, 1, 0, 1]].astype(np.float64)
    inside = np.clip(boxes, 0, bounds)
    zero = relevant & ~(boxes[:, 2:] - boxes[:, :2] >= MIN_BOX_SIDE).all(1)
    outside = relevant & ~zero & ~(inside[:, 2:] - inside[:, :2] >= MIN_BOX_SIDE).all(1)
    clipped = relevant & ~zero & ~outside & (np.abs(boxes - inside) > CLIP_TOLERANCE).any(1)

    def example(i: int) -> str:
        corners = ", ".join(f"{v:g}" for v in boxes[i])
        return f"{tables.paths[owners[i]]} [{corners}] in {bounds[i, 0]:g}x{bounds[i, 1]:g}"

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
    ends = np.searchsorted(owners[rows], np.arange(len(sizes) + 1))
    images = []
    for i in np.flatnonzero(present):
        part = slice(ends[i], ends[i + 1])
        width, height = sizes[i].tolist()
        columns = (inside[part], classes[part], crowd[part], areas[part])
        images.append(LabelledImage(tables.ids[i], Path(tables.paths[i]), width, height, *columns))
    return images


def _correct_sizes(
    tables: LabelTables, sizes: np.ndarray, owners: np.ndarray, boxes: np.ndarray, problems: Problems
) -> bool:
    """Look at the pictures whose boxes leave the size that the labels give: is it theirs? Changes ``sizes``.

    Returns:
        whether a size was changed.
    """
    leaving = ((boxes < -CLIP_TOLERANCE) | (boxes > sizes[owners][:, [0, 1, 0, 1]] + CLIP_TOLERANCE)).any(1)
    given = np.array(tables.sizes, dtype=np.int64).reshape(-1, 2)
    suspects = np.unique(owners[leaving])
    suspects = suspects[(given[suspects] > 0).all(1)]  # else it is the picture's own already
    changed = False
    for index, size in zip(suspects, _header_sizes([tables.paths[i] for i in suspects]), strict=True):
        if isinstance(size, ImageError) or tuple(given[index]) == size:
            continue
        text = f"{tables.paths[index]}: {given[index][0]}x{given[index][1]}, the picture is {size[0]}x{size[1]}"
        theirs = boxes[owners == index]
        if (theirs >= -CLIP_TOLERANCE).all() and (theirs <= np.array(size * 2) + CLIP_TOLERANCE).all():
            problems.add("wrong size in the labels", text)
            sizes[index] = size
            changed = True
        else:
            problems.add("size differs from the picture's", text)
    return changed


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


def size(width: Any, height: Any) -> tuple[int, int]:
    """An image's size as a file gives it; (0, 0) unless both are numbers of 1 or more: some tools write zeros."""
    return (int(width), int(height)) if number(width) and number(height) and min(width, height) >= 1 else (0, 0)
