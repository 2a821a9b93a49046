"""Reading labels from a PASCAL VOC folder: ``Annotations/*.xml``, ``JPEGImages``, ``ImageSets/Main/<split>.txt``."""

from __future__ import annotations

import os
from pathlib import Path
from xml.etree import ElementTree

from siamese_detr.errors import UserError
from siamese_detr.images.listing import existing, is_image
from siamese_detr.images.problems import LabelTables, Problems, number, size

_MAX_BYTES = 50_000_000


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types: they bring entities, which expand to anything."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which annotations do not need")


def is_voc(path: Path) -> bool:
    """Whether ``path`` is a VOC folder or one of its lists of images."""
    if path.is_dir():
        return (path / "Annotations").is_dir()
    # .../ImageSets/Main/<split>.txt
    return path.suffix == ".txt" and path.parts[-3:-1] == ("ImageSets", "Main") and is_voc(path.parents[2])


def read_voc(path: Path, images: str | None, split: str | None, problems: Problems) -> tuple[Path, LabelTables]:
    """The folder of the images, and the tables. Classes are those of the whole folder, so that its splits agree.

    VOC's corners are pixels counted from 1, both inclusive: the box of (1, 1, w, h) is the whole image.

    Raises:
        UserError: no annotations, an unknown split, or no folder of images.
    """
    if path.is_file():
        path, split = path.parents[2], path.stem
    folder = path / "Annotations"
    try:
        stems = sorted(name[:-4] for name in os.listdir(folder) if name.lower().endswith(".xml") and name[0] != ".")
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from None
    if not stems:
        raise UserError(f"{folder} holds no .xml file")
    chosen = set(stems) if split is None else _split(path, split)
    missing = chosen - set(stems)
    if split is not None and missing == chosen:
        raise UserError(f"{path}: none of the images of split {split!r} has a file in {folder}")
    for stem in sorted(missing):
        problems.add("unreadable label file", f"{stem}.xml: no such file")
    root = _image_folder(path, images)
    try:
        files = {
            name.rpartition(".")[0]: name for name in sorted(os.listdir(root)) if name[0] != "." and is_image(name)
        }
    except OSError as error:
        raise UserError(f"cannot list {root}: {error.strerror}") from None

    tables = LabelTables([], [], [], [], [])
    names: list[str] = []
    all_names: set[str] = set()
    for number_, stem in enumerate(stems, 1):
        try:
            annotation = _parse(folder / f"{stem}.xml")
        except (ValueError, LookupError, OSError, ElementTree.ParseError, RecursionError) as error:
            if stem in chosen:
                problems.add("unreadable label file", f"{folder / stem}.xml: {' '.join(str(error).split())}")
            continue
        objects = annotation.findall("object")
        all_names.update(name for name in map(_name, objects) if name)
        if stem not in chosen:
            continue
        given = os.path.basename(annotation.findtext("filename", "").strip().replace("\0", ""))
        file = given if given and os.path.exists(root / given) else files.get(stem, given or f"{stem}.jpg")
        tables.paths.append(str(root / file))
        tables.ids.append(number_)
        tables.sizes.append(size(*(_float(annotation.findtext(f"size/{side}")) for side in ("width", "height"))))
        for entry in objects:
            name, box = _name(entry), _box(entry)
            if not name or box is None:
                problems.add("malformed box", f"{folder / stem}.xml: {name!r}, {box}")
                continue
            tables.owners.append(len(tables.paths) - 1)
            names.append(name)
            tables.boxes.append(box)
            tables.crowd.append(entry.findtext("difficult", "0").strip() == "1")
            tables.areas.append(float("nan"))
    tables.class_names = sorted(all_names)
    if not all_names and tables.paths:
        raise UserError(f"{folder}: no annotation in it has a named object")
    tables.category_ids = list(range(1, len(all_names) + 1))
    index = {name: i for i, name in enumerate(tables.class_names)}
    tables.classes = [index[name] for name in names]
    return root, tables


def _parse(path: Path) -> ElementTree.Element:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError("too large for an annotation")
    return ElementTree.parse(path, ElementTree.XMLParser(target=_NoDoctype())).getroot()


def _split(path: Path, split: str) -> set[str]:
    folder = path / "ImageSets" / "Main"
    file = folder / f"{split}.txt"
    if not file.is_file():
        known = sorted(p.stem for p in folder.glob("*.txt") if "_" not in p.stem) if folder.is_dir() else []
        raise UserError(
            f"{file} does not exist: the splits are {', '.join(known) or 'none, as that folder has no .txt'}"
        )
    try:
        # Lists of one class have a second column that says whether the class is there; the images are the first.
        stems = {line.split()[0] for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not stems:
        raise UserError(f"{file} lists no image")
    return stems


def _image_folder(path: Path, images: str | None) -> Path:
    if images is not None:
        return existing(images)
    for name in ("JPEGImages", "images", "Images"):
        if (path / name).is_dir():
            return path / name
    raise UserError(f"{path} has no folder JPEGImages: name the folder with the pictures with 'images'")


def _name(entry: ElementTree.Element) -> str:
    return entry.findtext("name", "").strip()


def _box(entry: ElementTree.Element) -> tuple[float, float, float, float] | None:
    x1, y1, x2, y2 = (_float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return (x1 - 1, y1 - 1, x2, y2) if all(map(number, (x1, y1, x2, y2))) else None


def _float(text: str | None) -> float:
    try:
        return float(text) if text is not None else float("nan")
    except ValueError:
        return float("nan")
