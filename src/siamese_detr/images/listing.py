"""Which images there are: a folder searched to its leaves (shards are folders too), a list file, the image table of a
COCO JSON, or what is behind a URL."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeGuard

from siamese_detr.errors import UserError
from siamese_detr.images.names import locate
from siamese_detr.images.shards import COMPRESSED, SUFFIX, SUFFIXES, as_url, list_shard, list_url, location, member_of

HEIF = importlib.util.find_spec("pillow_heif") is not None
"""Whether the package is there that reads phones' HEIC pictures."""
EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "gif", "tif", "tiff", "bmp", "dib"}
    | {"ppm", "pgm", "pbm", "pnm", "jp2", "j2k", "jpx", "avif"}
    | ({"heic", "heif"} if HEIF else set())
)
"""Names that end so (in any case) count as images in a folder; what is inside decides when the file is read."""

UNREAD = frozenset(
    {"heic", "heif", "jxl", "cr2", "cr3", "nef", "arw", "dng", "raf", "orf", "rw2", "psd", "exr", "hdr", "svg", "jxr"}
)
"""Pictures that are not read: counted, so that nobody misses them."""

_LIST_SUFFIXES = {".txt", ".lst", ".list"}


@dataclass(frozen=True)
class ImageList:
    """Images below one folder.

    Args:
        root: absolute folder, or URL of one (see :func:`siamese_detr.images.shards.location`).
        paths: POSIX paths relative to ``root`` (of images in shards: as ``shards`` writes them), without
            repetition, sorted by code point.
        problems: what was left out and why, one line each (folders without permission, names that are not Unicode).
    """

    root: Path
    paths: Sequence[str]
    problems: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.paths)

    def absolute(self, index: int) -> str:
        """Absolute path of one image."""
        return os.path.join(location(self.root), self.paths[index])


def list_images(source: str | Path, images: str | Path | None = None, without: str | Path | None = None) -> ImageList:
    """List the images of a folder, a shard, a URL, a list file or a COCO JSON.

    Images are not opened, nor looked at one by one; of shards, the names are read.

    Args:
        source: a folder (searched recursively; hidden files and folders are passed over, links followed once, ``.tar``
            and ``.parquet`` files looked into); one such file; a URL of either, of any scheme that fsspec knows; a
            ``.txt`` with one path per line, absolute or relative to the list's folder (blank lines and lines starting
            with ``#`` are ignored); or a COCO ``.json``.
        images: the folder that a COCO JSON's ``file_name`` entries start from. Without it the JSON's own folder, its
            ``images`` folder and their neighbours are tried.
        without: a folder in ``source`` that is left out: where the command writes.

    Raises:
        UserError: ``source`` does not exist, is none of these, or leads to no image.
    """
    url = as_url(source)
    if url is not None and url.startswith("file:///"):  # of what fsspec may not list it says nothing
        return list_images(url.removeprefix("file://"), images, without)
    if url is not None:
        paths, problems = list_url(url, is_image)
        if not paths:
            raise UserError(f"no image behind {url}" + (f": {problems[0]}" if problems else ""))
        return ImageList(Path(url.rpartition("/")[0] if url.lower().endswith(SUFFIXES) else url), paths, problems)
    path = existing(source)
    if path.is_dir():
        return _scan(path, without)
    if path.suffix.lower() in SUFFIXES:
        problems = []
        paths = _look_into(str(path.parent), path.name, problems)
        if not paths:
            raise UserError(f"no image in {path}" + (f": {problems[0]}" if problems else ""))
        return ImageList(path.parent, paths, problems)
    if path.suffix.lower() in _LIST_SUFFIXES:
        return _read_list(path)
    if path.suffix.lower() == ".json":
        names = [
            entry.get("file_name") for entry in json_table(path, read_json(path), "images") if isinstance(entry, dict)
        ]
        usable = sorted({name for name in names if is_name(name)})
        if not usable:
            raise UserError(f"{path}: no image in it has a 'file_name'; is it a COCO JSON?")
        root = image_root(path, usable, images)
        usable, renamed = locate(root, usable)
        missing = len(names) - sum(map(is_name, names))
        problems = [f"{path}: {missing} images without a usable 'file_name'"] if missing else []
        return _relative(root, (os.path.join(root, name) for name in usable), [*problems, *_renamed(path, renamed)])
    raise UserError(
        f"{path} is no folder, no shard (.tar, .parquet), no list of images (.txt) and no COCO JSON (.json): give one "
        "of these"
    )


def existing(path: str | Path) -> Path:
    """The absolute path, or `UserError` naming the nearest parent that does exist."""
    absolute = Path(os.path.abspath(os.path.expanduser(path)))
    if "\0" in str(path):
        raise UserError(f"{path!r} is not a path")
    if os.path.exists(absolute):
        return absolute
    parent = next((p for p in absolute.parents if p.is_dir()), Path("/"))
    raise UserError(f"{absolute} does not exist (the nearest folder that does is {parent}): check the path")


def read_json(path: Path) -> Any:
    """Parse a JSON file; `UserError` names the file and the place of the mistake."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            return json.load(stream)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: not UTF-8 text, or nested too deeply") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def json_table(path: Path, content: Any, key: str) -> list:
    """A list at the top level of a COCO JSON; `UserError` if it is not there."""
    table = content.get(key) if isinstance(content, dict) else None
    if not isinstance(table, list):
        raise UserError(
            f"{path} has no list {key!r} at its top level: a COCO JSON has 'images', 'annotations', 'categories'"
        )
    return table


def image_root(json_path: Path, names: Sequence[str], images: str | Path | None) -> Path:
    """The folder that a COCO JSON's ``file_name`` entries start from: the one below which most of a sample exist."""
    sample = names[:: max(1, len(names) // 50)][:100]
    if images is not None:
        candidates = [existing(images)]
        if not candidates[0].is_dir():
            raise UserError(f"{candidates[0]} is not a folder: 'images' must name the folder with the pictures")
    else:
        folder = json_path.parent
        split = json_path.stem.rpartition("_")[2]  # instances_train2017.json -> train2017
        beside = [folder, folder.parent]
        candidates = [base / sub for base in beside for sub in ("", "images", split, f"images/{split}")]
    hits = [sum(os.path.isfile(root / name) for name in sample) for root in candidates]
    if max(hits) == 0:  # perhaps they are written in another way
        hits = [len(locate(root, sample)[1]) if root.is_dir() else 0 for root in candidates]
    if max(hits) == 0:
        looked = ", ".join(dict.fromkeys(str(root) for root in candidates if root.is_dir()))
        raise UserError(
            f"{json_path}: none of its images (such as {names[0]!r}) was found in {looked}: "
            "name their folder ('images'; fine-tuning: 'train_images', 'val_images'), or put the JSON file beside them"
        )
    return Path(os.path.abspath(candidates[hits.index(max(hits))]))


def is_name(value: object) -> TypeGuard[str]:
    """Whether a value from a file can be a file's name."""
    return isinstance(value, str) and bool(value.strip()) and "\0" not in value and _is_unicode(value)


def _scan(root: Path, without: str | Path | None) -> ImageList:
    """Depth first in the order of the relative paths, so that nothing needs sorting as a whole."""
    paths: list[str] = []
    problems: list[str] = []
    seen: set[tuple[int, int]] = set()
    if without is not None and os.path.isdir(without) and not os.path.samefile(without, root):
        status = os.stat(without)
        seen.add((status.st_dev, status.st_ino))
    unread: list[str] = []
    pending = [""]  # relative folders end with "/", images do not
    while pending:
        item = pending.pop()
        if item and not item.endswith("/"):
            paths += [item] if not item.endswith(SUFFIXES) else _look_into(str(root), item, problems)
            continue
        folder = os.path.join(root, item)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:  # a link back to a folder already listed
                continue
            seen.add((status.st_dev, status.st_ino))
            found = _entries(folder, problems, unread)
        except OSError as error:
            if not item:
                raise UserError(f"cannot list the folder {root}: {error.strerror}") from None
            problems.append(f"cannot list {folder}: {error.strerror}")
            continue
        odd = [name for name in found if not _is_unicode(name)]
        problems += [f"name is not Unicode: {os.fsencode(folder + name)!r}; rename it" for name in odd]
        found = sorted(set(found).difference(odd)) if odd else sorted(found)
        problems += [
            f"{folder}{name} is a compressed shard, which cannot be read from the middle: unpack it to {SUFFIX}"
            for name in found
            if name.endswith(COMPRESSED)
        ]
        found = [name for name in found if not name.endswith(COMPRESSED)]
        if not any(name.endswith(("/", *SUFFIXES)) for name in found):
            paths += [item + name for name in found]
        else:
            pending += [item + name for name in reversed(found)]
    if unread:
        endings = Counter(name.rpartition(".")[2].lower() for name in unread)
        counts = ", ".join(f"{count} .{ending}" for ending, count in endings.most_common())
        problems.insert(
            0,
            f"{len(unread)} pictures of formats that are not read ({counts}; such as {unread[0]}): convert them to JPEG"
            + (", or install pillow-heif" if {"heic", "heif"} & set(endings) else ""),
        )
    if not paths:
        known = ", ".join(sorted(EXTENSIONS))
        passed = f" ({problems[0]})" if problems else ""
        raise UserError(f"no image in {root} or its subfolders{passed}; looked for names ending in {known}")
    return ImageList(root, paths, problems)


def _entries(folder: str, problems: list[str], unread: list[str]) -> list[str]:
    """Images, shards and folders (which end with "/") in a folder; pictures of other formats go to ``unread``."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            wanted = is_image(name) or name.endswith((*SUFFIXES, *COMPRESSED))
            try:
                is_folder = entry.is_dir()
            except OSError as error:  # a link to itself, or to where one may not look: its neighbours are well
                is_folder = False
                if not wanted:
                    problems.append(f"cannot list {folder}{name}: {error.strerror}")
            if is_folder:
                found.append(name + "/")
            elif wanted:
                found.append(name)
            elif name.rpartition(".")[2].lower() in UNREAD:
                unread.append(folder + name)
    return found


def is_image(name: str) -> bool:
    """Whether a name ends like an image's."""
    return "." in name and name.rpartition(".")[2].lower() in EXTENSIONS


def _look_into(root: str, shard: str, problems: list[str]) -> list[str]:
    """The images in a shard, as paths relative to ``root``; what is wrong with it is added to ``problems``."""
    members, found = list_shard(os.path.join(root, shard), is_image)
    problems += found
    return sorted(str(replace(member, shard=shard)) for member in members)


def _read_list(path: Path) -> ImageList:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = [line.strip() for line in stream]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8: give a list with one image path per line") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    names = [line for line in lines if line and not line.startswith("#")]
    if not names or not all(map(is_name, names)):
        raise UserError(f"{path} lists no images: give one image path per line")
    names, renamed = locate(path.parent, names)
    paths = sorted({os.path.normpath(os.path.join(path.parent, name)) for name in names})
    if not any(os.path.isfile(m.shard if (m := member_of(name)) else name) for name in islice(paths, 100)):
        raise UserError(
            f"{path}: none of the files it lists exists (such as {paths[0]}): relative paths start at the list's folder"
        )
    return _relative(path.parent, paths, _renamed(path, renamed))


def _renamed(path: Path, renamed: Sequence[str]) -> list[str]:
    """The line about images that a file names in another way than they are called, if there are any."""
    return [f"{path}: {len(renamed)} images have another name there, {renamed[0]}"] if renamed else []


def _relative(folder: Path, paths: Iterable[str], problems: list[str]) -> ImageList:
    """The images below ``folder``, or below what it shares with those that lie elsewhere."""
    normal = {os.path.normpath(path) for path in paths}
    root = str(folder)
    if not all(path.startswith(root.rstrip("/") + "/") for path in normal):
        root = os.path.commonpath([root, *normal])
    relative = sorted(path.removeprefix(root.rstrip("/") + "/") for path in normal)
    return ImageList(Path(root), [Path(p).as_posix() if os.sep != "/" else p for p in relative], problems)


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
