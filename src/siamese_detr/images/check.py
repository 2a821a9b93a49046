"""The verb ``check``: what is wrong with images and labels, and what a run would do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.table import Table

from siamese_detr.config import Options, verb
from siamese_detr.errors import ImageError, UserError
from siamese_detr.files import write_json
from siamese_detr.images.duplicates import Fingerprint, equal_groups, fingerprints, similar_groups
from siamese_detr.images.labels import DetectionDataset, find_labels, has_split, read_labels
from siamese_detr.images.listing import existing, list_images
from siamese_detr.images.memory import from_memory
from siamese_detr.images.names import class_map
from siamese_detr.images.problems import ACTIONS, MAX_EXAMPLES, Problem
from siamese_detr.messages import output, track
from siamese_detr.runtime.cores import usable_cores


@dataclass
class CheckConfig(Options):
    """Find problems in images and labels before a long run: corrupt, tiny and repeated images, faulty boxes, scarce
    classes, images shared by training and validation.

    Every image is decoded. Says for each problem what a run would do about it; changes nothing.

    Args:
        data: labels (COCO JSON, VOC folder, YOLO data.yaml), or images without labels (folder, list file); or several
            label sources, which are united as fine-tuning does.
        val: validation labels, to be compared with ``data``. For a YOLO data.yaml its own ``val`` split by default.
        images: folder of the images of ``data``, where it is not the usual one.
        val_images: folder of the images of ``val``, likewise.
        split: split of ``data`` (YOLO: train by default; VOC: all).
        val_split: split of ``val`` (YOLO: val by default; VOC: all).
        out: write the report there as JSON.
        fix: write the labels of ``data`` there as COCO JSON, as a run would use them: without what is left out.
        workers: processes that decode images; 0 for one per processor.
        min_labels: classes with fewer boxes than this are reported.
        min_side: images whose short side is less than this many pixels are reported.
        near_duplicates: also look for images that are only similar (saved again, resized).
    """

    COMMON: ClassVar = ("data", "val", "images", "val_images", "split", "val_split", "out", "fix", "near_duplicates")

    data: str | tuple[str, ...]
    val: str | None = None
    images: str | None = None
    val_images: str | None = None
    split: str | None = None
    val_split: str | None = None
    out: str | None = None
    fix: str | None = None
    workers: int = 0
    min_labels: int = 10
    min_side: int = 32
    near_duplicates: bool = True

    def check(self) -> None:
        if not isinstance(self.data, str) and len(self.data) == 1:
            (self.data,) = self.data

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        data = self.data if isinstance(self.data, str) else ""
        for name, source in (("split", data), ("val_split", self.val or "")):
            if Path(source).suffix.lower() == ".json":
                yield (name,), "a COCO JSON has no splits"
        if self.val is None and Path(data).suffix.lower() == ".json":
            yield ("val_images", "val_split"), "there are no validation labels (val)"


@dataclass
class ClassCount:
    """Boxes of one class (crowds not counted), images that show it, and how many boxes are pseudo-labels."""

    name: str
    boxes: int
    images: int
    val_boxes: int = 0
    val_images: int = 0
    pseudo_labels: int = 0


@dataclass
class CheckReport:
    """What `check` found.

    Args:
        images: number of images looked at, by part (``data``, ``val``).
        readable: how many of them could be decoded.
        classes: boxes and images by class; empty without labels.
        findings: the problems; empty if there are none.
    """

    images: dict[str, int] = field(default_factory=dict)
    readable: dict[str, int] = field(default_factory=dict)
    classes: list[ClassCount] = field(default_factory=list)
    findings: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def print(self, console: Console | None = None) -> None:
        """Print the report as tables."""
        console = console or output()
        for part, count in self.images.items():
            console.print(f"{part}: {count} images, {self.readable[part]} readable", highlight=False)
        if self.classes:
            columns = ["boxes", "images", "val_boxes", "val_images"][: 2 * len(self.images)]
            if any(c.pseudo_labels for c in self.classes):
                columns.insert(1, "pseudo_labels")
            table = Table("class", *(column.replace("pseudo_", "pseudo-").replace("_", " ") for column in columns))
            for c in self.classes:
                table.add_row(_plain(c.name), *(str(getattr(c, column)) for column in columns))
            console.print(table)
        if self.ok:
            console.print("no problems found")
            return
        table = Table("", "where", "problem", "count", "what a run does", show_lines=True)
        for number, f in enumerate(self.findings, 1):
            table.add_row(str(number), f.where, f.kind, str(f.count), f.action)
        console.print(table)
        for number, f in enumerate(self.findings, 1):
            for example in f.examples[:3]:  # outside the table, where paths stay whole
                console.print(f"{number}  {_plain(example)}", highlight=False, soft_wrap=True)


@from_memory("data", "val")
@verb(CheckConfig)
def check(config: CheckConfig) -> CheckReport:
    """Look for corrupt, tiny and repeated images, faulty boxes, scarce classes and images shared by training and
    validation.

    Every image is decoded. Says for each problem what a run would do about it; changes nothing.

    Returns:
        what was found; its ``ok`` is whether nothing was.
    """
    if config.workers < 0 or config.min_side < 0 or config.min_labels < 0:
        raise UserError("workers, min_side and min_labels must not be negative")
    report = CheckReport()
    data, paths = _read(report, "data", config.data, config.images, config.split)
    if config.fix is not None and data is None:
        raise UserError(f"fix has no effect: {config.data} holds no labels; leave it out")
    parts = {"data": paths}
    datasets = {"data": data}
    val = config.val
    if val is None and data is not None and config.split in (None, "train"):
        sources = [config.data] if isinstance(config.data, str) else config.data
        val = next((source for source in sources if has_split(source, "val")), None)
    if val is not None:
        try:
            datasets["val"], parts["val"] = _read(
                report, "val", val, config.val_images or config.images, config.val_split
            )
        except UserError:
            if config.val is not None:
                raise
    prints = {part: _decode(report, part, paths, config) for part, paths in parts.items()}
    _add_duplicates(report, prints, config.near_duplicates)
    _add_classes(report, datasets.get("data"), datasets.get("val"), config.min_labels)
    written: dict[str, dict[str, Any]] = {}
    if config.out is not None:
        written[config.out] = report.to_dict()
    if config.fix is not None and data is not None:
        readable = {item.path for item in prints["data"]}
        kept = [image for image in data.images if str(image.path) in readable]
        root = Path(config.fix).absolute().parent
        written[config.fix] = replace(data, root=root, images=kept).to_coco(original_ids=True)
    for file, content in written.items():
        try:
            write_json(Path(file), content, indent=2)
        except OSError as error:
            raise UserError(f"cannot write {file}: {error.strerror}") from None
    report.print()
    return report


def _read(
    report: CheckReport, part: str, source: str | tuple[str, ...], images: str | None, split: str | None
) -> tuple[DetectionDataset | None, list[str]]:
    """The labels, if there are any, and the paths of the images; notes what reading the labels dropped."""
    path = existing(source) if isinstance(source, str) else Path()
    dataset = None
    default_split = "val" if part == "val" else "train"
    try:
        if not isinstance(source, str) or find_labels(path, split or default_split) is not None:
            dataset = read_labels(source, images, split, default_split=default_split)
    except UserError as error:
        if not isinstance(source, str) or not path.is_dir():
            raise
        # A folder of pictures may hold other .json or .yaml files besides.
        _note(report, part, "no usable labels in the folder", "checked as images without labels", [str(error)])
    if dataset is not None:
        report.findings += [replace(p, where=f"{part}: {p.where}" if p.where else part) for p in dataset.problems]
        empty = [str(image.path) for image in dataset.images if not len(image.boxes)]
        _note(report, part, "image without objects", "used as background, where nothing is to be found", empty)
        return dataset, [str(image.path) for image in dataset.images]
    listed = list_images(path, images)
    _note(report, part, "not listed", "left out", listed.problems)
    return None, [listed.absolute(i) for i in range(len(listed))]


def _decode(report: CheckReport, part: str, paths: list[str], config: CheckConfig) -> list[Fingerprint]:
    """Decode all images of one part; notes those that fail or are tiny."""
    found = fingerprints(paths, config.workers or usable_cores())
    shown = track(found, f"decoding {part}", len(paths))
    prints, errors, tiny = [], [], []
    for item in shown:
        if isinstance(item, ImageError):
            errors.append(f"{item.path}: {item.reason}")
            continue
        prints.append(item)
        size = f"{item.width}x{item.height}"
        if min(item.width, item.height) < config.min_side:
            tiny.append(f"{item.path}: {size}")
    report.images[part], report.readable[part] = len(paths), len(prints)
    action = "skipped, counted and listed in the run's directory; the run stops if they are too many"
    _note(report, part, "unreadable image", action, errors)
    _note(report, part, "tiny image", "used, enlarged; there is little to learn from it", tiny)
    return prints


def _add_duplicates(report: CheckReport, prints: dict[str, list[Fingerprint]], near: bool) -> None:
    """Notes repetitions within each part, and images that both have."""
    items = [(part, item) for part, found in prints.items() for item in found]
    everything = [item for _, item in items]
    equal = equal_groups(everything)
    kinds = {"the same file": equal}
    if near:
        same = {index: group[0] for group in equal for index in group}
        similar = ([i for i in group if same.get(i, i) == i] for group in similar_groups(everything))
        kinds["nearly the same picture"] = [group for group in similar if len(group) > 1]
    # Of equal files only the first stands in a group of similar ones: where it is in `data`, its twins in `val` are
    # leaks already.
    for what, groups in kinds.items():
        leaks = []
        for part in prints:
            inside = [[items[i][1].path for i in group if items[i][0] == part] for group in groups]
            repeated = [" = ".join(group[:4]) for group in inside if len(group) > 1]
            action = "each is used: together they count as often as they occur"
            count = sum(len(group) - 1 for group in inside if len(group) > 1)
            _note(report, part, f"duplicate image ({what})", action, repeated, count)
        for group in groups:
            first = next((items[i][1].path for i in group if items[i][0] == "data"), None)
            leaks += [f"{items[i][1].path} = {first}" for i in group if items[i][0] == "val" and first is not None]
        action = "evaluated all the same, so the figures come out too good: take them out of one of the two"
        _note(report, "data and val", f"validation image also in data ({what})", action, leaks)


def _add_classes(
    report: CheckReport, data: DetectionDataset | None, val: DetectionDataset | None, min_labels: int
) -> None:
    """Counts boxes by class; notes scarce classes and those known to one part only."""
    if data is None:
        return
    known = np.full(len(data.class_names), -1)  # of each class of data, the class of val that a run takes for the same
    val_counts = np.zeros((1, 2), np.int64)  # the last row is of the classes that val does not have
    if val is not None:
        val_counts = np.concatenate([val.class_counts(), val_counts])
        with contextlib.suppress(UserError):  # none in common, which the notes below say
            known = class_map(data.class_names, val.class_names)
    columns = (data.class_counts().tolist(), data.pseudo_counts().tolist(), val_counts[known].tolist())
    for name, (boxes, images), pseudo, (val_boxes, val_images) in zip(data.class_names, *columns, strict=True):
        report.classes.append(ClassCount(name, boxes, images, val_boxes, val_images, pseudo))
    none = [c.name for c in report.classes if not c.boxes]
    _note(report, "data", "class without boxes", "stays in the model's list of classes, never learnt", none)
    few = [f"{c.name}: {c.boxes}" for c in report.classes if 0 < c.boxes < min_labels]
    action = "trained on as they are; a fraction of the labels keeps at least one image of each class"
    _note(report, "data", f"class with fewer than {min_labels} boxes", action, few)
    if val is not None:
        unseen = [c.name for c in report.classes if c.boxes and not c.val_boxes]
        _note(report, "val", "class of data without boxes in val", "trained, but left out of the mean AP", unseen)
        alien = [name for k, name in enumerate(val.class_names) if val_counts[k, 0] and k not in known]
        _note(report, "val", "class unknown to data", ACTIONS["box of an unknown class"], alien)


def _note(
    report: CheckReport, where: str, kind: str, action: str, examples: Iterable[str], count: int | None = None
) -> None:
    found = list(examples)
    if found:
        total = len(found) if count is None else count
        report.findings.append(Problem(kind, action, total, found[:MAX_EXAMPLES], where))


def _plain(text: str) -> str:
    """Square brackets in names are not rich's markup."""
    return text.replace("[", r"\[")
