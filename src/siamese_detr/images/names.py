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
