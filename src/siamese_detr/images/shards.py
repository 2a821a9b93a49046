"""Images inside shards, tar (WebDataset's layout) or Parquet, and images behind a URL of any kind that fsspec knows.

A member of a shard is addressed by a path of its own, which says where its bytes are::

    train-0042.tar::000000123904+20480::cats/7.jpg       shard :: offset + size :: name
    train-0042.parquet::000000000017::cats/7.jpg         shard :: row :: name

So a list of images, or a proposal store, is all the index that random access needs: the order of samples, exact
continuation and everything else hold as for loose files, and a sample costs one read (a ranged request behind a URL):
of its bytes in a tar file, of its row group in a Parquet file (:mod:`.parquet`). The names of a shard are read once and
kept in the user's cache folder.

URLs are fsspec's, chains included: ``s3://bucket/photos``, ``https://host/train-0042.tar``,
``simplecache::s3://bucket/photos`` (each shard is copied to the local disk when first used).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import posixpath
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from siamese_detr.errors import ImageError, UserError
from siamese_detr.files import write_text
from siamese_detr.images import parquet

SUFFIX = ".tar"
SUFFIXES = (SUFFIX, parquet.SUFFIX)
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")
_MEMBER = re.compile(
    r"(?P<shard>.+\.(?:tar|parquet))::(?P<offset>\d{12,})(?:\+(?P<size>\d+))?::(?P<name>.*)",
    re.IGNORECASE | re.DOTALL,
)
_URL = re.compile(r"(?P<scheme>(?:[a-zA-Z][a-zA-Z0-9+.-]+::)*[a-zA-Z][a-zA-Z0-9+.-]+):/+")
_BLOCK = 512  # tar's unit


@dataclass(frozen=True)
class Member:
    """An image in a shard.

    Attributes:
        shard: path or URL of the file.
        offset, size: where its bytes are; of a Parquet file the row, and None.
        name: its name in the file.
    """

    shard: str
    offset: int
    size: int | None
    name: str

    def __str__(self) -> str:
        # Zeros in front make the order of the paths that of the shard: what is read in order is read in one sweep.
        size = "" if self.size is None else f"+{self.size}"
        return f"{self.shard}::{self.offset:012d}{size}::{self.name}"


def member_of(path: str) -> Member | None:
    """The member that a path addresses, None for any other path."""
    found = _MEMBER.fullmatch(path)
    if found is None or (found["size"] is None) != is_parquet(found["shard"]):
        return None
    return Member(
        found["shard"], int(found["offset"]), None if found["size"] is None else int(found["size"]), found["name"]
    )


def is_parquet(shard: str) -> bool:
    return shard.lower().endswith(parquet.SUFFIX)


def as_url(path: str | Path) -> str | None:
    """The URL that a path is, None for a local path. (`pathlib` folds a URL's two slashes into one: they are put
    back.)
    """
    found = _URL.match(str(path))
    if found is None:
        return None
    scheme = found["scheme"]
    return f"{scheme}:{'///' if scheme.endswith('file') else '//'}{str(path)[found.end() :]}"


def location(path: str | Path) -> str:
    """A path or URL as text."""
    return as_url(path) or str(path)


def is_plain_file(path: str) -> bool:
    """Whether a path names a file of the local file system, all of it."""
    return as_url(path) is None and member_of(path) is None


def read_bytes(path: str) -> bytes:
    """The bytes of a member, or of a file behind a URL.

    Raises:
        ImageError: they cannot be had, all of them.
    """
    member = member_of(path)
    try:
        if member is None:
            system, inside = open_url(path)
            return system.cat_file(inside)
        if member.size is None:
            return _parquet_bytes(path, member)
        if as_url(member.shard) is None:
            with open(member.shard, "rb") as stream:
                stream.seek(member.offset)
                # The size comes from a file: never take memory for more than there is.
                content = stream.read(min(member.size, max(0, os.fstat(stream.fileno()).st_size - member.offset)))
        else:
            system, inside = open_url(member.shard)
            content = system.cat_file(inside, start=member.offset, end=member.offset + member.size)
    except FileNotFoundError:
        raise ImageError(path, "no such shard" if member else "no such file") from None
    except ImageError:
        raise
    except Exception as error:  # whatever the network and the file system of that URL come up with
        raise ImageError(path, f"cannot be fetched ({_words(error)})") from error
    if len(content) > member.size:
        raise ImageError(path, "the server ignores byte ranges; use simplecache::URL")
    if len(content) < member.size:
        raise ImageError(path, f"the shard ends early ({len(content)} of {member.size} bytes are there)")
    return content


def _parquet_bytes(path: str, member: Member) -> bytes:
    stamp: tuple[int, ...] = ()
    if as_url(member.shard) is None:
        status = os.stat(member.shard)
        stamp = status.st_size, status.st_mtime_ns
    group, place = _parquet_layout(member.shard, stamp).place(member.offset)
    content = _parquet_group(member.shard, stamp, group)[place].as_py()
    if content is None:
        raise ImageError(path, "its row holds no bytes")
    return content


@functools.lru_cache(maxsize=64)
def _parquet_layout(shard: str, stamp: tuple[int, ...]) -> parquet.Layout:
    with _parquet_stream(shard) as stream:
        return parquet.find_layout(stream)


@functools.lru_cache(maxsize=1)  # images read in order cost one reading of their group
def _parquet_group(shard: str, stamp: tuple[int, ...], group: int) -> pa.Array:
    with _parquet_stream(shard) as stream:
        return parquet.column(stream, _parquet_layout(shard, stamp), group)


def _parquet_stream(shard: str) -> Any:
    if as_url(shard) is None:
        return pa.OSFile(shard)
    system, inside = open_url(shard)
    return system.open(inside, "rb", block_size=2**20)


def open_url(url: str | Path) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Never kept: an instance must not survive a fork.

    Raises:
        UserError: no such scheme, or what it needs is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(location(url))
    except (ValueError, ImportError) as error:
        raise UserError(f"{location(url)}: {_words(error)}") from None


def list_url(url: str, wanted: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The images behind a URL, below a folder or in one shard.

    Args:
        url: of a folder or a shard.
        wanted: whether a name is that of an image.

    Returns:
        their paths relative to the folder (or to the shard's), sorted, and what could not be listed and why.

    Raises:
        UserError: nothing there.
    """
    try:
        system, inside = open_url(url)
        if url.lower().endswith(SUFFIXES):
            files, base = [inside], inside.rpartition("/")[0]
        else:
            files, base = system.find(inside), inside.rstrip("/")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot list {url}: {_words(error)}") from error
    paths: list[str] = []
    problems: list[str] = []
    for file in sorted(files):
        relative = file.removeprefix(base).lstrip("/")
        if relative.lower().endswith(SUFFIXES):
            root = url.rpartition("/")[0] if file == inside else url.rstrip("/")
            found, trouble = list_shard(f"{root}/{relative}", wanted)
            paths += [str(replace(member, shard=relative)) for member in found]
            problems += trouble
        elif wanted(relative):
            paths.append(relative)
    return sorted(paths), problems


def list_shard(shard: str, wanted: Callable[[str], bool]) -> tuple[list[Member], list[str]]:
    """The images in a shard, in its order, and what is wrong with it (one line each).

    Args:
        shard: path or URL.
        wanted: whether a name is that of an image (rows of a Parquet file are images whatever their name).
    """
    rows_only = is_parquet(shard)
    try:
        if as_url(shard) is None:
            status = os.stat(shard)
            key = f"{os.path.abspath(shard)} {status.st_size} {status.st_mtime_ns}"
            opened: Any = open(shard, "rb")  # noqa: SIM115 (closed below)
        else:
            system, inside = open_url(shard)
            key = f"{shard} {system.size(inside)} {system.ukey(inside)}"
            opened = system.open(inside, "rb", block_size=2**20)
        with opened as stream:
            rows, problems = _cached(key, lambda: _read_rows(stream) if rows_only else _read_index(stream))
    except Exception as error:
        cause = _cause(error)
        reason = "no such shard" if isinstance(cause, FileNotFoundError) else f"cannot be read ({_words(cause)})"
        return [], [f"{shard}: {reason}"]
    if rows_only:
        return [Member(shard, row, None, name) for row, _, name in rows], []
    members = [Member(shard, offset, size, name) for offset, size, name in rows if wanted(name)]
    return members, [f"{shard}: {problem}" for problem in problems]


Index = tuple[list[tuple[int, int, str]], list[str]]


def _read_index(stream: BinaryIO) -> Index:
    """(offset, size, name) of the files of a tar, in order, and what is wrong with it."""
    rows: list[tuple[int, int, str]] = []
    problems: list[str] = []
    odd = 0
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        try:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else they pile up
                if not info.isreg() or info.issparse():
                    continue
                name = posixpath.normpath("/" + info.name)[1:]
                if "\n" in name or not name.isprintable():
                    odd += 1
                    continue
                rows.append((info.offset_data, info.size, name))
        except (tarfile.TarError, OSError, ValueError) as error:
            problems.append(f"damaged after {len(rows)} files ({_words(error)}): the rest is not used")
        else:
            # `tarfile` takes any bytes that are no header for the end; the end is a block of zeros.
            stream.seek(tar.offset)
            if stream.read(_BLOCK).strip(b"\0") or stream.tell() < tar.offset + _BLOCK:
                problems.append(f"ends early, or is damaged, after {len(rows)} files: the rest is not used")
    if odd:
        problems.append(f"{odd} files with unprintable names")
    return rows, problems


def _read_rows(stream: BinaryIO) -> Index:
    """(row, 0, name) of the rows of a Parquet file."""
    return [(row, 0, name) for row, name in enumerate(parquet.names(stream))], []


def _cached(key: str, read: Callable[[], Index]) -> Index:
    """An index from the user's cache folder, or read and put there. A cache that does not work is done without."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    file = Path(home) / "siamese-detr" / "shards" / hashlib.sha256(key.encode()).hexdigest()
    try:
        head, *lines = file.read_text(encoding="utf-8").split("\n")
        if head == f"{len(lines)} {key}":
            rows = [line.split(" ", 2) for line in lines]
            return [(int(offset), int(size), name) for offset, size, name in rows], []
    except (OSError, ValueError):
        pass
    rows_read, problems = read()
    if not problems:  # a damaged shard is looked at, and complained of, each time
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(f"\n{offset} {size} {name}" for offset, size, name in rows_read)
            write_text(file, f"{len(rows_read)} {key}{text}")
    return rows_read, problems


def _cause(error: BaseException) -> BaseException:
    """The cause: fsspec raises FileNotFoundError also for a server that does not respond."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return error if cause is None or getattr(cause, "status", None) == 404 else cause


def _words(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())[:200]
