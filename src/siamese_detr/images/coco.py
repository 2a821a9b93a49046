"""Reading labels from a COCO JSON (``images``, ``annotations``, ``categories``)."""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from faster_coco_eval import mask as masks

from siamese_detr.errors import UserError
from siamese_detr.images.listing import image_root, is_name, json_table, read_json
from siamese_detr.images.names import locate
from siamese_detr.images.problems import LabelTables, Problems, number, score, size

MAX_ID = 2**53
"""Up to here floats hold integers exactly, and detections travel between processes as rows of floats."""


def read_coco(path: Path, images: str | None, problems: Problems) -> tuple[Path, LabelTables]:
    """The root of the images, and the tables. Classes come in ascending order of their ids.

    Raises:
        UserError: the file is not a COCO JSON, has no categories, or its images are nowhere to be found.
    """
    content = read_json(path)
    tables = {key: json_table(path, content, key) for key in ("images", "annotations", "categories")}
    used = {_identifier(entry.get("category_id")) for entry in tables["annotations"] if isinstance(entry, dict)}
    names, class_index, category_ids = _categories(path, tables["categories"], used, problems)
    entries = _unique_images(tables["images"], problems)
    if not entries:
        raise UserError(f"{path}: no usable image ({problems.summary() or 'it lists none'})")
    names_given = [entry["file_name"] for entry in entries]
    root = image_root(path, names_given, images)
    located, renamed = locate(root, names_given)
    for example in renamed:
        problems.add("file name written differently", example)
    rows, row_of = _unite(entries, located, problems)
    keys = [entries[i]["id"] for i in rows]
    ids = keys
    odd = [key for key in keys if type(key) is not int or not -MAX_ID <= key <= MAX_ID]
    if odd:
        problems.add("image ids are no integers, or very large", repr(odd[0]))
        ids = list(range(1, len(keys) + 1))
    result = LabelTables(
        paths=[os.path.normpath(os.path.join(root, located[i])) for i in rows],
        ids=ids,
        sizes=[size(entries[i].get("width"), entries[i].get("height")) for i in rows],
        class_names=names,
        category_ids=category_ids,
        convention="xywh",
    )
    _add_boxes(result, tables["annotations"], row_of, class_index, problems)
    return root, result


def _identifier(value: Any) -> str | None:
    """An id as text, so that 7, 7.0 and "7" are one; None if it is none. Ids are names, never numbers to count with."""
    if type(value) is float and value.is_integer():
        value = int(value)
    return str(value).strip() if type(value) in (int, str) else None


def _unite(entries: list[dict], located: list[str], problems: Problems) -> tuple[list[int], dict[str, int]]:
    """The entries of different files, and the row of each image id: one file under several ids is one image."""
    rows: list[int] = []
    first: dict[str, int] = {}
    row_of: dict[str, int] = {}
    for index, (entry, name) in enumerate(zip(entries, located, strict=True)):
        row = first.setdefault(os.path.normpath(name), len(rows))
        if row == len(rows):
            rows.append(index)
        else:
            problems.add("one file under several image ids", f"{name}: {entries[rows[row]]['id']}, {entry['id']}")
        row_of[_identifier(entry["id"]) or ""] = row
    return rows, row_of


def _categories(
    path: Path, table: list, used: Collection[str | None], problems: Problems
) -> tuple[list[str], dict[str, int], list[int]]:
    """Names by class index, the class index of every category id, and the ids as numbers."""
    by_id: dict[str, str] = {}
    groups = {entry.get("supercategory") for entry in table if isinstance(entry, dict)}
    for entry in table:
        id_, name = (_identifier(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if id_ is None or not isinstance(name, str) or not name.strip():
            problems.add("malformed class", repr(entry))
        elif name in groups and id_ not in used and entry.get("supercategory") != name and len(table) > 1:
            problems.add("class that only groups others", repr(name))  # Roboflow's first category is the project
        elif by_id.setdefault(id_, name.strip()) != name.strip():
            raise UserError(
                f"{path}: category id {id_} stands for both {by_id[id_]!r} and {name!r}: give each its own id"
            )
    if not by_id:
        raise UserError(f"{path}: 'categories' names no class (each needs an 'id' and a 'name')")
    numbers = all(re.fullmatch(r"-?\d{1,18}", id_) for id_ in by_id)
    order = sorted(by_id, key=int) if numbers else sorted(by_id)
    names: list[str] = []
    for id_ in order:
        name = by_id[id_]
        if name in names:
            problems.add("repeated class name", f"{name!r} (id {id_})")
            while name in names or name in by_id.values():
                name += f" {id_}"
        names.append(name)
    ids = [int(id_) for id_ in order] if numbers else list(range(1, len(order) + 1))
    return names, {id_: index for index, id_ in enumerate(order)}, ids


def _unique_images(table: list, problems: Problems) -> list[dict]:
    """Entries with usable id and file name. Two files under one id leave open whose the boxes are: neither is used."""
    by_id: dict[str, dict] = {}
    ambiguous: set[str] = set()
    for entry in table:
        key = _identifier(entry.get("id")) if isinstance(entry, dict) else None
        if key is None or not is_name(entry.get("file_name")):
            problems.add("malformed image entry", repr(entry))
            continue
        first = by_id.setdefault(key, entry)
        if first is not entry:
            problems.add("duplicate image id", f"{key}: {first['file_name']}, {entry['file_name']}")
            if first["file_name"] != entry["file_name"]:
                ambiguous.add(key)
    return [entry for key, entry in by_id.items() if key not in ambiguous]


def _add_boxes(
    tables: LabelTables,
    annotations: list,
    image_index: dict[str, int],
    class_index: dict[str, int],
    problems: Problems,
) -> None:
    seen: dict[Any, tuple] = {}
    for entry in annotations:
        if not isinstance(entry, dict):
            problems.add("malformed box", repr(entry))
            continue
        image, category, box = _identifier(entry.get("image_id")), _identifier(entry.get("category_id")), _box(entry)
        if image is None or image not in image_index:
            problems.add(
                "box of an unknown image", f"annotation {entry.get('id')!r}: image_id {entry.get('image_id')!r}"
            )
        elif category is None or category not in class_index:
            problems.add(
                "box of an unknown class", f"annotation {entry.get('id')!r}: category_id {entry.get('category_id')!r}"
            )
        elif box is None:
            problems.add("malformed box", f"annotation {entry.get('id')!r}: bbox {entry.get('bbox')!r}")
        else:
            id_ = entry.get("id")
            if type(id_) in (int, str):
                label = (image, category, *box)
                first = seen.setdefault(id_, label)
                if first is not label:
                    repeated = first == label
                    problems.add("repeated box" if repeated else "duplicate annotation id", f"annotation {id_!r}")
                    if repeated:
                        continue
            area = entry.get("area")
            tables.owners.append(image_index[image])
            tables.classes.append(class_index[category])
            tables.boxes.append(box)
            tables.crowd.append(entry.get("iscrowd") in (1, True))
            tables.areas.append(float(area) if number(area) else float("nan"))
            tables.scores.append(score(entry.get("score")))


def _box(entry: dict) -> tuple[float, float, float, float] | None:
    """An annotation's box as x, y, width, height in pixels: its `bbox`, or the box around its mask."""
    box, mask = entry.get("bbox"), entry.get("segmentation")
    if isinstance(box, list) and len(box) == 4 and all(map(number, box)):
        if any(box[2:]) or not mask:
            return tuple(box)
    elif box is not None and box != []:
        return None
    if isinstance(mask, list) and all(isinstance(part, list) and all(map(number, part)) for part in mask):
        xs, ys = [x for part in mask for x in part[::2]], [y for part in mask for y in part[1::2]]
        return (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)) if xs and ys else None
    if isinstance(mask, dict):
        with suppress(Exception):  # whatever the library raises for a damaged mask
            height, width = mask["size"]
            coded = mask if isinstance(mask["counts"], str) else masks.frPyObjects(mask, height, width)
            x, y, width, height = masks.toBbox(coded).tolist()
            return x, y, width, height
    return None
