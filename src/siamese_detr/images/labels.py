"""Labelled images from COCO JSON, VOC folders or YOLO's data.yaml, in one form."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.errors import UserError
from siamese_detr.images.coco import read_coco
from siamese_detr.images.listing import existing
from siamese_detr.images.names import class_key
from siamese_detr.images.problems import LabelledImage, LabelTables, Problem, Problems, assemble
from siamese_detr.images.voc import is_voc, read_voc
from siamese_detr.images.yolo import is_yolo, read_description, read_yolo, split_sources
from siamese_detr.randomness import rng

__all__ = ["DetectionDataset", "LabelledImage", "Problem", "dataset_key", "read_labels"]


@dataclass
class DetectionDataset:
    """Labelled images.

    Args:
        root: folder of the images.
        class_names: name of each class index.
        images: the images, also those without boxes.
        problems: what was dropped, clipped or changed while reading.
        category_ids: the label file's own id of each class index.
    """

    root: Path
    class_names: list[str]
    images: list[LabelledImage]
    problems: list[Problem] = field(default_factory=list)
    category_ids: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def take(self, fraction: float, seed: int = 0) -> DetectionDataset:
        """A reproducible random part of the images, in their order.

        Every class that has a box keeps at least one image with such a box (crowds count only for classes that have
        nothing else), so the part may be larger than asked for. For one seed the parts are nested: each contains all
        smaller ones.

        Args:
            fraction: part of the images, in (0, 1].
            seed: non-negative.

        Raises:
            UserError: ``fraction`` is outside (0, 1], or ``seed`` negative.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"fraction must be above 0 and at most 1, not {fraction}")
        if seed < 0:
            raise UserError(f"seed must not be negative, not {seed}")
        order = rng(seed).permutation(len(self.images)).tolist()
        covering: dict[int, None] = {}  # an ordered set
        covered: set[int] = set()
        for with_crowds in (False, True):
            for index in order:
                image = self.images[index]
                new = set(image.classes[~image.crowd | with_crowds].tolist()) - covered
                if new:
                    covering[index] = None
                    covered |= new
        count = max(1, len(covering), round(fraction * len(self.images)))
        ranked = [*covering, *(index for index in order if index not in covering)]
        return replace(self, images=[self.images[index] for index in sorted(ranked[:count])])

    def to_coco(self, original_ids: bool = False) -> dict[str, Any]:
        """The dataset as COCO JSON content: boxes as xywh, annotations numbered from 1.

        Args:
            original_ids: use the label file's category ids; else category ids are the class indices, from 0.
        """
        category_ids = self.category_ids if original_ids else range(len(self.class_names))
        categories = [{"id": i, "name": name} for i, name in zip(category_ids, self.class_names, strict=True)]
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for image in self.images:
            name = Path(os.path.relpath(image.path, self.root)).as_posix()
            images.append({"id": image.id, "file_name": name, "width": image.width, "height": image.height})
            columns = (image.boxes, image.classes, image.crowd, image.areas, image.scores)
            for (x1, y1, x2, y2), class_, crowd, area, score in zip(*(c.tolist() for c in columns), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image.id,
                        "category_id": category_ids[class_],
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": area,
                        "iscrowd": int(crowd),
                        **({} if math.isnan(score) else {"score": round(score, 5)}),
                    }
                )
        return {"images": images, "annotations": annotations, "categories": categories}

    def class_counts(self) -> np.ndarray:
        """int64 (classes, 2): for each class the number of boxes that are no crowds, and of images with one."""
        counts = np.zeros((len(self.class_names), 2), dtype=np.int64)
        for image in self.images:
            classes = image.classes[~image.crowd]
            np.add.at(counts[:, 0], classes, 1)
            counts[np.unique(classes), 1] += 1
        return counts

    def pseudo_counts(self) -> np.ndarray:
        """int64 (classes,): for each class the number of boxes that a detector found, which are those with scores."""
        found = [image.classes[~np.isnan(image.scores)] for image in self.images]
        return np.bincount(np.concatenate([*found, np.zeros(0, np.int64)]), minlength=len(self.class_names))


def read_labels(
    path: str | Path | Sequence[str | Path],
    images: str | None = None,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    default_split: str = "train",
) -> DetectionDataset:
    """Read labels, whichever of the known kinds they are.

    Single faults (see `siamese_detr.images.problems.ACTIONS`) are corrected or left out, and counted in ``problems``.
    Boxes are clipped to the image; the sizes that the labels give are compared with those in the images' headers.

    Args:
        path: a COCO JSON; a VOC folder (``Annotations``, ``JPEGImages``, or XML files beside the images) or one of its
            ``ImageSets/Main/*.txt``; a YOLO ``data.yaml`` or darknet ``obj.data``; a folder that holds exactly one such
            file, or Label Studio's ``classes.txt``; or a folder with a sub-folder for each split, as Roboflow exports;
            or several of these, which are united.
        images: folder of the images, where it is not the usual one.
        split: YOLO: ``train``, ``val`` or ``test`` (default: ``default_split``); VOC: a name in ``ImageSets/Main``
            (default: all annotations).
        default_split: the split of a YOLO ``data.yaml``, which names several, if ``split`` is not given: readers of
            validation labels say ``val``.
        class_names: the classes in the order to use, such as a model's; boxes of other classes are dropped and
            counted. By default the file's own: ascending category id (COCO, YOLO) or alphabetical (VOC).

    Raises:
        UserError: the labels as a whole are unusable: nothing of these kinds, nothing readable, no class, no image or
            no box left.
    """
    if not isinstance(path, str | Path):
        if not path:
            raise UserError("no labels are named: give one or more label files")
        sources = {str(one): read_labels(one, images, split, class_names, default_split) for one in path}
        return unite(sources) if len(sources) > 1 else next(iter(sources.values()))
    source = find_labels(existing(path), split or default_split)
    if source is None:
        known = "a COCO .json, a VOC folder (Annotations and JPEGImages, or .xml beside images) or a YOLO data.yaml"
        raise UserError(f"{path} holds no known labels: give {known}")
    problems = Problems()
    if source.suffix.lower() == ".json":
        root, tables = read_coco(source, images, problems)
    elif is_yolo(source):
        root, tables = read_yolo(source, images, split or default_split, problems)
    else:
        root, tables = read_voc(source, images, split, problems)
    if class_names is not None:
        _choose_classes(tables, class_names, problems)
    found = assemble(tables, problems, source)
    if not found:
        raise UserError(f"{source}: no usable image ({problems.summary() or 'it lists none'})")
    if not any(len(image.boxes) for image in found):
        why = problems.summary() or "there are no annotations"
        raise UserError(f"{source}: no usable box in {len(found)} images ({why}): fix the labels")
    if all((image.boxes <= 1).all() for image in found):
        raise UserError(f"{source}: no box reaches beyond the first pixel: give pixels, not shares of the image")
    return DetectionDataset(root, tables.class_names, found, problems.as_list(), tables.category_ids)


def unite(sources: Mapping[str, DetectionDataset]) -> DetectionDataset:
    """One data set of several, those with pseudo-labels last. Classes are the same if their names are, without case,
    blanks and punctuation. An image in several has the boxes of all, but pseudo-labels only if it has no others.

    Args:
        sources: data sets by name; their problems keep it as ``where``.
    """
    ordered = dict(sorted(sources.items(), key=lambda item: item[1].pseudo_counts().any()))
    names: list[str] = []
    images: dict[tuple[int, int], LabelledImage] = {}
    problems: list[Problem] = []
    for source, dataset in ordered.items():
        repeated = Problems()
        known = {class_key(name): k for k, name in reversed([*enumerate(names)])}
        known |= {name: k for k, name in enumerate(names)}
        keys = [class_key(name) for name in dataset.class_names]
        numbers = []
        for name, key in zip(dataset.class_names, keys, strict=True):
            alike = known.get(key, len(names)) if keys.count(key) == 1 else len(names)
            numbers.append(known.get(name, alike))
            names += [name] * (numbers[-1] == len(names))
        for image in dataset.images:
            status = image.path.stat()  # of the file itself, whatever links lead there
            file = status.st_dev, status.st_ino
            added = replace(image, id=len(images) + 1, classes=np.array(numbers)[image.classes])
            if file in images:
                repeated.add("image in several label sources", str(image.path))
                added = _joined(images[file], added)
            images[file] = added
        problems += [replace(problem, where=source) for problem in [*dataset.problems, *repeated.as_list()]]
    root = Path(os.path.commonpath([dataset.root for dataset in sources.values()]))
    return DetectionDataset(root, names, list(images.values()), problems, list(range(1, len(names) + 1)))


def _joined(first: LabelledImage, second: LabelledImage) -> LabelledImage:
    """The boxes of both, without the second's pseudo-labels, and without its boxes that the first has, too."""
    same = (first.boxes[None] == second.boxes[:, None]).all(-1) & (first.classes == second.classes[:, None])
    keep = np.isnan(second.scores) & ~same.any(1)
    columns = ("boxes", "classes", "crowd", "areas", "scores")
    both: dict[str, Any] = {n: np.concatenate([getattr(first, n), getattr(second, n)[keep]]) for n in columns}
    return replace(first, **both)


def dataset_key(*datasets: DetectionDataset) -> str:
    """Hash of labels: images by name, classes and boxes."""
    digest = hashlib.sha256()
    for dataset in datasets:
        digest.update(json.dumps(dataset.class_names).encode())
        for image in dataset.images:
            digest.update(f"{image.path.name}\n{image.width} {image.height}\n".encode(errors="surrogateescape"))
            for array in (image.boxes, image.classes, image.crowd):
                digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What the folder of a split may be called."""


def find_labels(path: Path, split: str = "train") -> Path | None:
    """The label file or VOC folder that an existing path stands for: itself, or the only one directly in that folder,
    or in its sub-folder of that split (as Roboflow exports COCO and VOC).

    Raises:
        UserError: the folder holds several, or none of that split.
    """
    if path.is_file():
        return path if path.suffix.lower() == ".json" or is_yolo(path) or is_voc(path) else None
    try:
        names = sorted(name for name in os.listdir(path) if not name.startswith("."))
        if is_voc(path):
            return path
    except OSError as error:
        raise UserError(f"cannot list {path}: {error.strerror}") from None
    if "classes.txt" in names and {"images", "labels"} <= set(names):
        return path / "classes.txt"
    for suffixes in ((".yaml", ".yml"), (".data",), (".json",)):
        files = [path / name for name in names if name.lower().endswith(suffixes)]
        if len(files) == 1:
            return files[0]
        if files:
            raise UserError(f"{path} holds several label files: name one ({', '.join(f.name for f in files[:8])})")
    splits = {kind: path / name for kind, known in SPLITS.items() for name in known if name in names}
    found = {kind: source for kind, folder in splits.items() if (source := _labels_inside(folder)) is not None}
    if split in found:
        return found[split]
    if found:
        raise UserError(f"{path} has labels of {', '.join(found)}, but none of {split}")
    years = [name for name in names if (path / name / "Annotations").is_dir()]
    if years:
        raise UserError(f"{path} holds VOC folders: name one ({', '.join(years)})")
    return None


def has_split(path: str | Path, split: str) -> bool:
    """Whether labels name their splits themselves (a data.yaml, Roboflow's folders), and this one is there."""
    try:
        source, other = find_labels(existing(path), split), find_labels(existing(path), "train")
        if source is not None and is_yolo(source):
            return bool(split_sources(source, read_description(source), split))
    except UserError:
        return False
    return source != other


def _labels_inside(folder: Path) -> Path | None:
    """The one COCO JSON in a folder, or the folder itself if it is VOC's."""
    if not folder.is_dir():
        return None
    if is_voc(folder):
        return folder
    files = [name for name in os.listdir(folder) if name.lower().endswith(".json") and name[0] != "."]
    return folder / files[0] if len(files) == 1 else None


def _choose_classes(tables: LabelTables, class_names: Sequence[str], problems: Problems) -> None:
    """Renumber the classes as ``class_names`` has them; boxes of others are dropped."""
    wanted = {name: index for index, name in enumerate(class_names)}
    position = np.array([wanted.get(name, -1) for name in tables.class_names], dtype=np.int64)
    classes = position[np.array(tables.classes, dtype=np.int64)]
    problems.add_where("box of an unknown class", classes < 0, lambda i: repr(tables.class_names[tables.classes[i]]))
    kept = np.flatnonzero(classes >= 0).tolist()
    own = dict(zip(tables.class_names, tables.category_ids, strict=True))
    spare = max(tables.category_ids, default=0) + 1
    tables.category_ids = [own.get(name, spare + index) for index, name in enumerate(class_names)]
    tables.class_names = list(class_names)
    tables.classes = classes[kept].tolist()
    for name in ("owners", "boxes", "crowd", "areas", "scores"):
        column = getattr(tables, name)
        setattr(tables, name, [column[i] for i in kept])
