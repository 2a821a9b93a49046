"""Reading labels from a PASCAL VOC folder: ``Annotations/*.xml``, ``JPEGImages``, ``ImageSets/Main/<split>.txt``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from siamese_detr.errors import UserError
from siamese_detr.images.listing import existing, is_image
from siamese_detr.images.problems import LabelTables, Problems, number, score, size

_MAX_BYTES = 50_000_000


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses document types: they bring entities, which expand to anything."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a DOCTYPE, which annotations do not need")


def is_voc(path: Path) -> bool:
    """Whether ``path`` is a VOC folder, one of its lists of images, or a folder with XML files beside the images (as
    LabelImg and Roboflow write them)."""
    if path.is_dir():
        return (path / "Annotations").is_dir() or any(name.lower().endswith(".xml") for name in os.listdir(path))
    # .../ImageSets/Main/<split>.txt
    return path.suffix == ".txt" and path.parts[-3:-1] == ("ImageSets", "Main") and is_voc(path.parents[2])


def read_voc(path: Path, images: str | None, split: str | None, problems: Problems) -> tuple[Path, LabelTables]:
    """The folder of the images, and the tables. Classes are those of the whole folder, so that its splits agree.

    VOC's corners are pixels counted from 1, both inclusive: the box of (1, 1, w, h) is the whole image. Sub-folders are
    read, too: the picture of ``Annotations/a/x.xml`` is ``JPEGImages/a/x.jpg``.

    Raises:
        UserError: no annotations, an unknown split, or no folder of images.
    """
    if path.is_file():
        path, split = path.parents[2], path.stem
    folder = path / "Annotations" if (path / "Annotations").is_dir() else path
    stems = [name[:-4] for name in _files(folder) if name.lower().endswith(".xml")]
    if not stems:
        raise UserError(f"{folder} holds no .xml file")
    chosen = set(stems) if split is None else _split(path, split, stems, problems)
    if not chosen:
        raise UserError(f"{path}: none of the images of split {split!r} has a file in {folder}")
    root = path if folder == path and images is None else _image_folder(path, images)
    pictures = [name for name in _files(root) if is_image(name)]
    files = {os.path.splitext(name)[0]: name for name in pictures}
    elsewhere: dict[str, list[str]] = {}  # the same name in another sub-folder
    for name in pictures:
        elsewhere.setdefault(os.path.splitext(os.path.basename(name))[0], []).append(name)

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
        given = annotation.findtext("filename", "").strip().replace("\0", "").replace("\\", "/").rpartition("/")[2]
        same = elsewhere.get(os.path.basename(stem), [])
        file = files.get(stem) or (same[0] if len(same) == 1 else None)
        if file is None:
            named = os.path.join(os.path.dirname(stem), given or f"{os.path.basename(stem)}.jpg")
            file = files.get(os.path.splitext(named)[0], named)
        if given and os.path.splitext(given)[0] != os.path.splitext(os.path.basename(file))[0]:
            problems.add("file name in the XML differs from the XML's", f"{folder / stem}.xml says {given}")
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
            tables.scores.append(score(_float(entry.findtext("score"))))
    tables.class_names = sorted(all_names)
    if not all_names and tables.paths:
        raise UserError(f"{folder}: no annotation in it has a named object")
    tables.category_ids = list(range(1, len(all_names) + 1))
    index = {name: i for i, name in enumerate(tables.class_names)}
    tables.classes = [index[name] for name in names]
    return root, tables


def _files(folder: Path) -> list[str]:
    """Files below a folder, relative to it, sorted; hidden ones are passed over."""
    found: list[str] = []

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list {error.filename}: {error.strerror}") from None

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        inside = os.path.relpath(place, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in names if name[0] != "."]
    return sorted(found)


def _parse(path: Path) -> ElementTree.Element:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError("too large for an annotation")
    return ElementTree.parse(path, ElementTree.XMLParser(target=_NoDoctype())).getroot()


def _split(path: Path, split: str, stems: Sequence[str], problems: Problems) -> set[str]:
    """Those of the stems that a split's list names, with or without their sub-folder and ending."""
    folder = path / "ImageSets" / "Main"
    file = folder / f"{split}.txt"
    if not file.is_file():
        known = sorted(p.stem for p in folder.glob("*.txt") if "_" not in p.stem) if folder.is_dir() else []
        raise UserError(
            f"{file} does not exist: the splits are {', '.join(known) or 'none, as that folder has no .txt'}"
        )
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    if not lines:
        raise UserError(f"{file} lists no image")
    known_stems = {stem: stem for stem in stems}
    for stem in stems:
        known_stems.setdefault(os.path.basename(stem), stem)
    chosen: set[str] = set()
    for line in lines:
        # Lists of one class have a second column, 1, 0 or -1, that says whether the class is there. Names may hold
        # blanks, and a path or an ending before or after what the XML is called.
        for name in (line, re.sub(r"\s+-?[01]$", "", line)):
            plain = os.path.splitext(name)[0] if is_image(name) else name
            found = next((known_stems[n] for n in (name, plain, os.path.basename(plain)) if n in known_stems), None)
            if found is not None:
                chosen.add(found)
                break
        else:
            problems.add("unreadable label file", f"{line}.xml, which {file.name} lists: no such file")
    return chosen


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
