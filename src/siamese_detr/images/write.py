"""Writing labels as COCO JSON, VOC or YOLO, with links to the images, so that other tools and our readers take them."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import yaml

from siamese_detr.files import TEMPORARY, write_json
from siamese_detr.images.labels import DetectionDataset, LabelledImage
from siamese_detr.images.yolo import label_file

LabelForm = Literal["coco", "voc", "yolo"]


def write_labels(dataset: DetectionDataset, folder: Path, form: LabelForm) -> None:
    """Write a new folder that :func:`siamese_detr.images.labels.read_labels` takes; scores are kept.

    Images are linked, or copied where links cannot be made. They keep their names below their common folder; of two
    with the same name but for the ending, one gets a second ending, since VOC and YOLO name labels without it.

    Args:
        dataset: the labels.
        folder: to be made; whole, or not there.
        form: ``coco`` (``labels.json`` and ``images``), ``voc`` (``Annotations`` and ``JPEGImages``; crowds are
            "difficult") or ``yolo`` (``data.yaml``, ``images`` and ``labels``, with scores as a sixth number; crowds
            are left out).

    Raises:
        OSError: it is there already, or cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent, ignore_cleanup_errors=True) as temporary:
        inside = Path(temporary) / "labels"
        inside.mkdir()
        linked = _link_images(dataset, inside / ("JPEGImages" if form == "voc" else "images"))
        if form == "coco":
            content = linked.to_coco(original_ids=True)
            write_json(inside / "labels.json", content, indent=None)
        elif form == "voc":
            for image in linked.images:
                file = inside / "Annotations" / image.path.relative_to(linked.root).with_suffix(".xml")
                file.parent.mkdir(parents=True, exist_ok=True)
                _voc(image, linked.class_names).write(file, encoding="utf-8")
        else:
            description = {"train": "images", "names": dict(enumerate(linked.class_names))}
            text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
            (inside / "data.yaml").write_text(text, encoding="utf-8")
            for image in linked.images:
                file = Path(label_file(str(image.path)))
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text("".join(f"{line}\n" for line in _yolo(image)), encoding="utf-8")
        os.rename(inside, folder)


def _link_images(dataset: DetectionDataset, folder: Path) -> DetectionDataset:
    """The data set with its images in ``folder``, no two with one name but for the ending."""
    root = os.path.commonpath([image.path.parent for image in dataset.images])
    stems: set[Path] = set()
    images = []
    for image in dataset.images:
        name = image.path.relative_to(root)
        while name.with_suffix("") in stems:
            name = name.with_name(name.name + image.path.suffix)
        stems.add(name.with_suffix(""))
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        _link(image.path, link)
        images.append(replace(image, path=link))
    return replace(dataset, root=folder, images=images)


def _link(path: Path, link: Path) -> None:
    """Give a file a second name: by a hard link, since some tools follow no symbolic link out of their folder."""
    for way in (os.link, os.symlink, shutil.copyfile):
        try:
            way(path.resolve(), link)
            return
        except OSError:  # another file system, someone else's file, or no links at all
            if way is shutil.copyfile:
                raise


def _voc(image: LabelledImage, class_names: list[str]) -> ElementTree.ElementTree[ElementTree.Element]:
    """The XML of one image; corners are pixels counted from 1, both inclusive."""
    root = ElementTree.Element("annotation")

    def add(parent: ElementTree.Element, tag: str, value: object = "") -> ElementTree.Element:
        child = ElementTree.SubElement(parent, tag)
        child.text = str(value)
        return child

    add(root, "filename", image.path.name)
    size = add(root, "size")
    for side, value in (("width", image.width), ("height", image.height), ("depth", 3)):
        add(size, side, value)
    columns = (image.boxes, image.classes, image.crowd, image.scores)
    for (x1, y1, x2, y2), class_, crowd, score in zip(*(column.tolist() for column in columns), strict=True):
        entry = add(root, "object")
        add(entry, "name", class_names[class_])
        add(entry, "difficult", int(crowd))
        if not np.isnan(score):
            add(entry, "score", f"{score:.5f}")
        box = add(entry, "bndbox")
        for side, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
            add(box, side, f"{value:.2f}")
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _yolo(image: LabelledImage) -> list[str]:
    """The lines of one image: class, centre, width and height in parts of the image's size, and the score."""
    lines = []
    centres, sides = (image.boxes[:, :2] + image.boxes[:, 2:]) / 2, image.boxes[:, 2:] - image.boxes[:, :2]
    shares = np.concatenate([centres, sides], 1) / [image.width, image.height, image.width, image.height]
    for class_, share, crowd, score in zip(image.classes, shares, image.crowd, image.scores, strict=True):
        if not crowd:
            numbers = [*share, *([] if np.isnan(score) else [score])]
            lines.append(f"{class_} {' '.join(f'{value:.6f}' for value in numbers)}")
    return lines
