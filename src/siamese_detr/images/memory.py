"""Data sets in memory: written once to a folder, from which runs, their processes and their resumption read."""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image

from siamese_detr.config import Options
from siamese_detr.errors import UserError
from siamese_detr.files import TEMPORARY, write_json
from siamese_detr.images.decode import as_pixels, read_size

Function = TypeVar("Function", bound=Callable)
LABELS = ("train", "val", "labels", "data")
"""Arguments whose images must have boxes."""


def from_memory(*names: str) -> Callable[[Function], Function]:
    """Decorate a verb so that the arguments of these names may also be data sets in memory, see :func:`write_dataset`.
    They are written to ``OUT-data``, or, where the verb writes nothing, to a folder that is removed in the end."""

    def decorate(function: Function) -> Function:
        order = list(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            given = {**options, **dict(zip(order, args, strict=False))}

            def on_disk(name: str, value: Any) -> Any:
                return write_dataset(value, folder_for(given.get("out")), name) if is_data(value) else value

            positional = [on_disk(name, value) if name in names else value for name, value in zip(order, args)]  # noqa: B905
            by_name = {name: on_disk(name, value) if name in names else value for name, value in options.items()}
            return function(*positional, *args[len(positional) :], **by_name)

        note = f"{', '.join(names)} may also be in memory: a list of rows, or a Hugging Face data set (docs/python.md)."
        call.__doc__ = (call.__doc__ or "").replace("\n\nArgs:", f"\n\n{note}\n\nArgs:", 1)
        return cast(Function, call)

    return decorate


def is_data(value: Any) -> bool:
    """Whether a value holds images itself, and does not name them."""
    if isinstance(value, list | tuple):
        return not all(isinstance(item, str | os.PathLike) for item in value)
    rows = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    return rows and not isinstance(value, str | os.PathLike | Options)


def folder_for(out: Any) -> Path:
    """Where data go: beside the run, or where they are removed when Python ends."""
    if isinstance(out, str | os.PathLike):
        return Path(f"{Path(out)}-data")
    folder = tempfile.mkdtemp(prefix="siamese-detr-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def write_dataset(data: Iterable[Any], parent: Path, name: str) -> str:
    """Write images to ``PARENT/NAME-<hash of the content>`` as PNG, with a COCO JSON; not again if it is there.

    Args:
        data: rows: a Pillow image, an array (height, width, 3) of uint8, or a mapping with ``image`` (one of these, or
            a path) and, if labelled, ``boxes`` (N, 4), xyxy in pixels of the upright picture, with ``labels`` (N),
            names or numbers; or, as Hugging Face's ``datasets`` have them, ``objects`` with ``bbox`` (xywh) and
            ``category``.
        parent: folder of data sets.
        name: of the argument that the data were given for.

    Returns:
        the path of the COCO JSON.

    Raises:
        UserError: a row without what is needed; it is named.
    """
    if isinstance(data, Mapping):
        raise UserError(f"{name} is a mapping of {', '.join(map(str, data))}: give one of its data sets")
    parent.mkdir(parents=True, exist_ok=True)
    digest, images, annotations = hashlib.sha256(), [], []
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary) / "data"
        (folder / "images").mkdir(parents=True)
        for number, row in enumerate(data):
            where = f"row {number} of {name}"
            image = row.get("image") if isinstance(row, Mapping) else row
            if isinstance(image, str | os.PathLike):
                file = os.path.abspath(image)
                width, height = read_size(file)
            else:
                file = f"images/{number:06d}.png"
                pixels = as_pixels(image, f"the image in {where}")
                height, width = pixels.shape[:2]
                Image.fromarray(pixels).save(folder / file, compress_level=1)
                digest.update(pixels.tobytes())
            images.append({"id": number, "file_name": file, "width": width, "height": height})
            if name in LABELS:
                annotations += objects_of(row, number, where)
        names, ids = class_ids(data, [row["category_id"] for row in annotations])
        for k, annotation in enumerate(annotations, 1):
            annotation |= {"id": k, "category_id": ids[annotation["category_id"]]}
        categories = [{"id": k, "name": text} for k, text in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        digest.update(json.dumps(content).encode(errors="surrogateescape"))
        write_json(folder / "annotations.json", content, indent=None)
        place = parent / f"{name}-{digest.hexdigest()[:12]}"
        with contextlib.suppress(OSError):  # it is there, or another process was quicker
            os.rename(folder, place)
    return str(place / "annotations.json")


def objects_of(row: Any, number: int, where: str) -> list[dict[str, Any]]:
    """The boxes of a row as COCO annotations, with the labels given for category ids."""
    given = row if isinstance(row, Mapping) else {}
    objects = given.get("objects", given)
    if isinstance(objects, list | tuple):  # one mapping per object
        objects = {key: [item[key] for item in objects] for key in ("bbox", "category")}
    corners = "boxes" in objects
    try:
        boxes = np.array(objects["boxes" if corners else "bbox"], np.float64).reshape(-1, 4)
        labels = np.asarray(objects["category" if "category" in objects else "labels"]).reshape(len(boxes)).tolist()
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} needs boxes (N, 4), xyxy in pixels, and labels (N)") from None
    if corners:
        boxes[:, 2:] -= boxes[:, :2]
    return [
        {"image_id": number, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for label, box in zip(labels, boxes.tolist(), strict=True)
    ]


def class_ids(data: Any, labels: Iterable[Any]) -> tuple[list[str], dict[Any, int]]:
    """The class names, and the class index of each label: those a Hugging Face data set declares, else those there
    are, in their order."""
    features = getattr(data, "features", None) or {}
    names = declared_names(features.get("objects") or features.get("labels"))
    if names:
        return names, {**{name: k for k, name in enumerate(names)}, **{k: k for k in range(len(names))}}
    known = sorted(set(labels), key=lambda label: (isinstance(label, str), label))
    return [str(label) for label in known], {label: k for k, label in enumerate(known)}


def declared_names(feature: Any) -> list[str]:
    """The names of the first ``ClassLabel`` in a feature of a Hugging Face data set."""
    if getattr(feature, "names", None):
        return list(feature.names)
    inside = feature.values() if isinstance(feature, Mapping) else [getattr(feature, "feature", None)]
    return next((names for child in inside if child is not None and (names := declared_names(child))), [])
