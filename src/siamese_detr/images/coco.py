"""Reading labels from a COCO JSON (``images``, ``annotations``, ``categories``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from siamese_detr.errors import UserError
from siamese_detr.images.listing import image_root, is_name, json_table, read_json
from siamese_detr.images.problems import LabelTables, Problems, number, size


def read_coco(path: Path, images: str | None, problems: Problems) -> tuple[Path, LabelTables]:
    """The root of the images, and the tables. Classes come in ascending order of their ids.

    Raises:
        UserError: the file is not a COCO JSON, has no categories, or its images are nowhere to be found.
    """
    content = read_json(path)
    tables = {key: json_table(path, content, key) for key in ("images", "annotations", "categories")}
    names, class_index = _categories(path, tables["categories"], problems)
    entries = _unique_images(tables["images"], problems)
    if not entries:
        raise UserError(f"{path}: no usable image ({problems.summary() or 'it lists none'})")
    root = image_root(path, [entry["file_name"] for entry in entries], images)
    keys = [entry["id"] for entry in entries]
    ids = keys
    if not all(type(key) is int for key in keys):
        problems.add("image ids are no integers", repr(next(key for key in keys if type(key) is not int)))
        ids = list(range(1, len(keys) + 1))
    result = LabelTables(
        paths=[os.path.normpath(os.path.join(root, entry["file_name"])) for entry in entries],
        ids=ids,
        sizes=[size(entry.get("width"), entry.get("height")) for entry in entries],
        class_names=names,
        category_ids=list(class_index),
    )
    _add_boxes(result, tables["annotations"], {key: i for i, key in enumerate(keys)}, class_index, problems)
    return root, result


def _categories(path: Path, table: list, problems: Problems) -> tuple[list[str], dict[int, int]]:
    """Names by class index, and the class index of every category id."""
    by_id: dict[int, str] = {}
    for entry in table:
        id_, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if type(id_) is not int or not isinstance(name, str) or not name.strip():
            problems.add("malformed class", repr(entry))
        elif by_id.setdefault(id_, name) != name:
            raise UserError(
                f"{path}: category id {id_} stands for both {by_id[id_]!r} and {name!r}: give each its own id"
            )
    if not by_id:
        raise UserError(f"{path}: 'categories' names no class (each needs an integer 'id' and a 'name')")
    names: list[str] = []
    for id_ in sorted(by_id):
        name = by_id[id_]
        if name in names:
            problems.add("repeated class name", f"{name!r} (id {id_})")
            while name in names or name in by_id.values():
                name += f" {id_}"
        names.append(name)
    return names, {id_: index for index, id_ in enumerate(sorted(by_id))}


def _unique_images(table: list, problems: Problems) -> list[dict]:
    """Entries with usable id and file name. Two files under one id leave open whose the boxes are: neither is used."""
    by_id: dict[int | str, dict] = {}
    ambiguous: set[int | str] = set()
    for entry in table:
        if not (isinstance(entry, dict) and type(entry.get("id")) in (int, str) and is_name(entry.get("file_name"))):
            problems.add("malformed image entry", repr(entry))
            continue
        first = by_id.setdefault(entry["id"], entry)
        if first is not entry:
            problems.add("duplicate image id", f"{entry['id']}: {first['file_name']}, {entry['file_name']}")
            if first["file_name"] != entry["file_name"]:
                ambiguous.add(entry["id"])
    return [entry for key, entry in by_id.items() if key not in ambiguous]


def _add_boxes(
    tables: LabelTables, annotations: list, image_index: dict, class_index: dict[int, int], problems: Problems
) -> None:
    seen: dict[Any, tuple] = {}
    for entry in annotations:
        if not isinstance(entry, dict):
            problems.add("malformed box", repr(entry))
            continue
        image, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
        if not isinstance(image, int | str) or image not in image_index:
            problems.add("box of an unknown image", f"annotation {entry.get('id')!r}: image_id {image!r}")
        elif not isinstance(category, int) or category not in class_index:
            problems.add("box of an unknown class", f"annotation {entry.get('id')!r}: category_id {category!r}")
        elif not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
            problems.add("malformed box", f"annotation {entry.get('id')!r}: bbox {box!r}")
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
            x, y, width, height = box
            area = entry.get("area")
            tables.owners.append(image_index[image])
            tables.classes.append(class_index[category])
            tables.boxes.append((x, y, x + width, y + height))
            tables.crowd.append(entry.get("iscrowd") in (1, True))
            tables.areas.append(float(area) if number(area) else float("nan"))
