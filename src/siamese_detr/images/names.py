"""Names that travelled through other systems: files, found again where only one can be meant, and classes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from siamese_detr.errors import UserError

_FOREIGN = re.compile(r"(?:[A-Za-z]:)?/|\w+://")
"""Beginnings of a path of another machine: /data/..., C:/..., file:///... ."""


SYNONYMS = {"aeroplane": "airplane", "motorbike": "motorcycle", "sofa": "couch", "tvmonitor": "tv"}
"""PASCAL VOC's name -> COCO's name of the same thing."""


def class_key(name: str) -> str:
    """What the spellings of a class name share: no case, spaces and punctuation; VOC's and COCO's names are one."""
    letters = re.sub(r"[\W_]+", "", name.lower()) or name
    return SYNONYMS.get(letters, letters)


def locate(root: Path, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The names of files below ``root``, as they are written there.

    A name that leads to no file is compared without what systems change about it: backslashes, %20 and the like, case,
    the two ways in which Unicode writes an accent, and first folders that are not there (of another machine). If
    exactly one file is left, it is meant.

    Args:
        root: folder that the names start from.
        names: relative or absolute, as a label file gives them.

    Returns:
        for each name the file's name, relative to ``root`` (or absolute, where such a file exists); the name itself if
        none was found. And an example "written → found" of each that was found under another name.
    """
    located, renamed = list(names), []
    entries = cache(_entries)
    for index, name in enumerate(names):
        # Joined as text: what the label file names may be absolute.
        if "\\" not in name and os.path.exists(os.path.join(root, name)):
            continue
        tail = name.replace("\\", "/")
        foreign = _FOREIGN.match(tail) or not os.path.exists(os.path.join(root, tail.partition("/")[0]))
        found = _alike(root, tail, entries)
        while not found and foreign and "/" in tail:
            tail = tail.partition("/")[2]
            found = _alike(root, tail, entries)
        if len(found) == 1:
            located[index] = found[0]
            renamed.append(f"{name} → {found[0]}")
    return located, renamed


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", unquote(name.replace("\\", "/")))
    return os.path.normpath(name).casefold()


def _alike(root: Path, name: str, entries: Callable[[str], dict[str, list[str]]]) -> list[str]:
    """Files, relative to ``root``, whose plain names are that of ``name``. Only folders on the way to them are read: a
    root may have millions of files beside."""
    places = [""]
    for part in _plain(name).split("/"):
        places = [os.path.join(p, entry) for p in places for entry in entries(os.path.join(root, p)).get(part, ())]
    return [place for place in places if os.path.isfile(os.path.join(root, place))]


def _entries(folder: str) -> dict[str, list[str]]:
    """What is in a folder, by plain name; nothing, where it cannot be listed."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            found.setdefault(_plain(name), []).append(name)
    return found


def class_map(model_names: list[str], label_names: list[str]) -> np.ndarray:
    """(model classes,) int64: the label index of the class of the same name, −1 for none.

    Names are compared without case, spaces and punctuation; VOC's and COCO's names of the same thing are equal. A model
    whose classes have no names (LABEL_0, …) is assumed to have the classes of the labels, in the same order, if there
    are equally many.

    Raises:
        UserError: no class in common.
    """
    index: dict[str, int] = {}
    for k, name in enumerate(label_names):
        index.setdefault(class_key(name), k)
    found = np.array([index.get(class_key(name), -1) for name in model_names], np.int64)
    exact = {name: k for k, name in enumerate(label_names)}
    for k, name in enumerate(model_names):
        found[k] = exact.get(name, found[k])
    if (found < 0).all():
        if len(model_names) == len(label_names) and all(re.fullmatch(r"LABEL_\d+", name) for name in model_names):
            return np.arange(len(label_names))
        raise UserError(
            f"the detector's classes ({shorten(model_names)}) and the labels' ({shorten(label_names)}) "
            "have no name in common; rename the classes of one, or use other labels"
        )
    return found


def shorten(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", … {len(names)} in all" if len(names) > most else "")
