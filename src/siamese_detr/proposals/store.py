"""The store of proposals: a directory of immutable shards and a ``meta.json`` telling how they were made.

Row numbers are stable: rows are only ever added at the end (dropping a damaged shard is the one exception). A store
made in one go, interrupted or not, has its rows in the order of the sorted image paths; images added later come after.
Nothing is held in memory per row: 10 million rows cost the mapped pages that are being read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siamese_detr.errors import UserError
from siamese_detr.images.shards import as_url
from siamese_detr.proposals.shard import DamagedShard, Failure, Shard

FORMAT = 1
META = "meta.json"
_OPEN_SHARDS = 512  # mapped at a time, per process: two million images; opening one costs about 0.5 ms


class Images(Protocol):
    """What :meth:`ProposalStore.select` needs of an image list: a root and paths relative to it."""

    @property
    def root(self) -> Path: ...

    @property
    def paths(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class StoredImage:
    """A row of the store.

    Attributes:
        path: absolute path of the image.
        width, height: its size in pixels after the EXIF rotation.
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels of the rotated image, best first.
        scores: float32 (N,).
    """

    path: str
    width: int
    height: int
    boxes: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How the boxes were made: what must agree for more of them to be added.

    Attributes:
        method: "edge-boxes", "selective-search" or "random".
        parameters: the method's parameters, JSON values.
        image_root: absolute path of the folder the rows' paths are relative to.
    """

    method: str
    parameters: dict[str, Any]
    image_root: str

    @classmethod
    def read(cls, directory: Path) -> StoreSettings:
        file = directory / META
        try:
            values = json.loads(file.read_bytes())
            if values["format"] != FORMAT:
                raise UserError(
                    f"{file}: store format {values['format']!r}, but this version reads {FORMAT}; "
                    "run propose into a new directory"
                )
            settings = cls(values["method"], values["parameters"], values["image_root"])
            if not (isinstance(settings.method, str) and isinstance(settings.image_root, str)):
                raise TypeError("method and image_root must be text")
            if not isinstance(settings.parameters, dict):
                raise TypeError("parameters must be a mapping")
            return settings
        except FileNotFoundError:
            raise UserError(
                f"{directory}: no proposal store there ({META} is missing); make one with propose"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}: damaged ({error}); delete {directory} and run propose again") from error

    @property
    def images_gone(self) -> bool:
        """Whether the images' folder is no longer there."""
        return as_url(self.image_root) is None and not os.path.isdir(self.image_root)

    def key(self) -> str:
        """Hash of how the boxes were made, wherever the images are."""
        return hashlib.sha256(json.dumps([self.method, self.parameters], sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        values = {
            "format": FORMAT,
            "method": self.method,
            "parameters": self.parameters,
            "image_root": self.image_root,
        }
        return json.dumps(values, indent=2) + "\n"


@dataclass(slots=True)
class ProposalStore:
    """Read access to a store. Pickles to a few bytes per shard, so data workers open it at no cost.

    Attributes:
        directory: where the store is.
        settings: how it was made.
        shards: names of the shard files, in row order.
        starts: int64 (shards + 1,), the first row of each shard, then the number of rows.
        failures: the images that could not be read, with reasons; they have no row.
    """

    directory: Path
    settings: StoreSettings
    shards: tuple[str, ...]
    starts: np.ndarray
    failures: tuple[Failure, ...]
    _open: dict[int, Shard] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: str | Path, image_root: str | Path | None = None) -> ProposalStore:
        """Open a store: reads the shards' footers, no rows.

        Args:
            directory: what ``propose`` wrote, in one go or in parts.
            image_root: where the images are now, if they moved since.

        Raises:
            UserError: no store there, another format, a part missing, or a damaged shard.
        """
        directory = Path(directory).absolute()
        folders = _parts(directory) or [directory]
        settings = StoreSettings.read(folders[0])
        for folder in folders[1:]:
            if StoreSettings.read(folder) != settings:
                raise UserError(f"{folder} was made with other settings than {folders[0]}: make all parts alike")
        if image_root is not None:
            root = os.path.abspath(image_root)
            settings = StoreSettings(settings.method, settings.parameters, root)
        files = [file for folder in folders for file in shard_files(folder)]
        rows, failures = [0], []
        for file in files:
            with _damage_explained(file):
                shard = Shard(file)
            rows.append(shard.rows)
            failures += shard.failures
        names = tuple(file.relative_to(directory).as_posix() for file in files)
        return cls(directory, settings, names, np.cumsum(rows, dtype=np.int64), tuple(failures))

    def __getstate__(self) -> tuple:
        return self.directory, self.settings, self.shards, self.starts, self.failures

    def __setstate__(self, state: tuple) -> None:
        self.directory, self.settings, self.shards, self.starts, self.failures = state
        self._open = {}

    @property
    def image_root(self) -> Path:
        """The folder the rows' paths are relative to."""
        return Path(self.settings.image_root)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def row(self, index: int) -> StoredImage:
        """Row ``index`` (0 <= index < len).

        Raises:
            IndexError: no such row.
            UserError: the row's shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a store of {len(self)}")
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        with self._shard(number) as shard:
            row = shard.row(int(index) - int(self.starts[number]))
        path = os.path.join(self.settings.image_root, row.path)
        return StoredImage(path, row.width, row.height, row.boxes, row.scores)

    def sizes(self, rows: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """int32 (n, 2): width and height in pixels of the given rows (all rows if None).

        Raises:
            IndexError: a row outside the store.
            UserError: a damaged shard.
        """
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"rows outside a store of {len(self)}")
        out = np.empty((len(wanted), 2), np.int32)
        order = np.argsort(wanted, kind="stable")
        edges = np.searchsorted(wanted[order], self.starts)
        for number in np.flatnonzero(np.diff(edges)):
            part = order[edges[number] : edges[number + 1]]
            with self._shard(int(number)) as shard:
                out[part] = shard.sizes()[wanted[part] - self.starts[number]]
        return out

    def select(self, images: Images) -> np.ndarray:
        """int64 (n,): the rows of the given images, in the images' order, without those that failed.

        Raises:
            UserError: images that the store knows nothing of (the message counts them and names the first), none left,
                or a damaged shard.
        """
        paths = pa.array(self.relative_paths(images), pa.large_string())
        rows = self.find(paths)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            failed = pc.is_in(
                paths.take(missing), value_set=pa.array([f.path for f in self.failures], pa.large_string())
            )
            unknown = missing[~np.asarray(failed)]
            if len(unknown):
                raise UserError(
                    f"{self.directory}: no proposals for {len(unknown)} of {len(rows)} images, the first "
                    f"{images.root / images.paths[int(unknown[0])]}; run propose on them into the same directory"
                )
            rows = rows[rows >= 0]
        if not len(rows):
            raise UserError(f"{self.directory}: none of the {len(images.paths)} images could be read by propose")
        return rows

    def failed(self, paths: pa.Array) -> np.ndarray:
        """bool (n,): which paths (relative to the root) are among the failures."""
        failures = pa.array([failure.path for failure in self.failures], pa.large_string())
        return np.asarray(pc.is_in(paths.cast(pa.large_string()), value_set=failures))

    def relative_paths(self, images: Images) -> Sequence[str]:
        """The images' paths relative to this store's root (the same objects where the roots agree)."""
        root = os.path.realpath(self.settings.image_root)
        theirs = os.path.realpath(images.root)
        if root == theirs:
            return images.paths
        absolute = (os.path.normpath(os.path.join(theirs, path)) for path in images.paths)
        inside = root.rstrip(os.sep) + os.sep
        return [path.removeprefix(inside).replace(os.sep, "/") for path in absolute]

    def find(self, paths: pa.Array) -> np.ndarray:
        """int64 (n,): the row of each path (relative to the root), -1 where there is none.

        Fast where both are sorted.
        """
        paths = paths.cast(pa.large_string())
        order = np.arange(len(paths))
        if len(paths) > 1 and not pc.all(pc.less_equal(paths[:-1], paths[1:])).as_py():
            order = np.asarray(pc.sort_indices(paths))
            paths = paths.take(order)
        found = np.full(len(paths), -1, np.int64)
        for number in range(len(self.shards)):
            stored = self._paths(number)
            if not len(stored):
                continue
            # Only the part of the (sorted) request that can lie in this shard is hashed: linear in the end.
            span = pc.min_max(stored)
            first, last = _bisect(paths, span["min"].as_py(), False), _bisect(paths, span["max"].as_py(), True)
            if first < last:
                at = pc.index_in(paths[first:last], value_set=stored)
                hits = np.asarray(at.fill_null(-1)).astype(np.int64)
                part = found[first:last]
                part[hits >= 0] = hits[hits >= 0] + self.starts[number]
        out = np.empty(len(found), np.int64)
        out[order] = found
        return out

    def images_key(self, rows: np.ndarray) -> str:
        """Hash of the relative paths of these rows' images, whatever the rows' order."""
        shards = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [self._paths(n).take(pa.array(rows[shards == n] - self.starts[n])) for n in np.unique(shards).tolist()]
        paths = pa.concat_arrays(parts)
        if not pc.all(pc.less_equal(paths[:-1], paths[1:])).as_py():
            paths = paths.take(pc.sort_indices(paths))
        digest = hashlib.sha256()
        for start in range(0, len(paths), 2**16):
            digest.update("".join(f"{path}\n" for path in paths[start : start + 2**16].to_pylist()).encode())
        return digest.hexdigest()

    def iter_paths(self) -> Iterator[str]:
        """Relative paths of all rows, in row order."""
        for number in range(len(self.shards)):
            yield from self._paths(number).to_pylist()

    def _paths(self, number: int) -> pa.Array:
        with self._shard(number) as shard:
            return shard.paths().cast(pa.large_string())

    @contextlib.contextmanager
    def _shard(self, number: int) -> Iterator[Shard]:
        """Shard ``number``; its damage is a `UserError`."""
        file = self.directory / self.shards[number]
        with _damage_explained(file):
            shard = self._open.pop(number, None) or Shard(file)
            if shard.rows != self.starts[number + 1] - self.starts[number]:
                raise DamagedShard("it changed since the store was opened")
            self._open[number] = shard
            if len(self._open) > _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))  # the one unused for longest
            yield shard


@dataclass(frozen=True)
class Selection:
    """Some of a store's images, with numbers of their own, which do not depend on the order of the store's rows.

    Attributes:
        store: where they are.
        rows: int64 (n,), their rows in it, as :meth:`ProposalStore.select` gives them.
    """

    store: ProposalStore
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> StoredImage:
        """Image ``index`` (0 <= index < len). Raises as :meth:`ProposalStore.row`."""
        return self.store.row(int(self.rows[index]))

    def index(self, path: str) -> int | None:
        """The number of the image of that absolute path, None if it is none of these."""
        relative = path.removeprefix(os.path.join(self.store.settings.image_root, ""))
        row = int(self.store.find(pa.array([relative], pa.large_string())).item())
        found = np.flatnonzero(self.rows == row).tolist() if row >= 0 else []
        return found[0] if found else None

    def sizes(self, rows: np.ndarray | Sequence[int] | None = None) -> np.ndarray:
        """int32 (n, 2): width and height in pixels of the given images (all if None)."""
        return self.store.sizes(self.rows if rows is None else self.rows[np.asarray(rows, np.int64)])


def shard_files(directory: Path) -> list[Path]:
    """The shards of a store, in row order."""
    return sorted(directory.glob("shard-*.arrow"))


def part_name(part: int, parts: int) -> str:
    """The folder, inside a store's, of what one of several machines computes; ``part`` counts from 1."""
    return f"part-{part:05d}-of-{parts:05d}"


def _parts(directory: Path) -> list[Path]:
    """The parts of a store that several machines made, in row order; none if one did."""
    found = sorted(path.name for path in directory.glob("part-*-of-*"))
    if not found or (directory / META).exists():
        return []
    count = int(found[0][-5:])
    if missing := sorted({part_name(i, count) for i in range(1, count + 1)} - set(found)):
        raise UserError(f"{directory}: {len(missing)} parts are missing, the first {missing[0]}: run propose for them")
    if len(found) > count:
        raise UserError(f"{directory} holds parts of different divisions: keep one and remove the others")
    return [directory / name for name in found]


def _bisect(paths: pa.Array, value: str, right: bool) -> int:
    low, high = 0, len(paths)
    while low < high:
        middle = (low + high) // 2
        here = paths[middle].as_py()
        if here < value or (right and here == value):
            low = middle + 1
        else:
            high = middle
    return low


@contextlib.contextmanager
def _damage_explained(file: Path) -> Iterator[None]:
    try:
        yield
    except DamagedShard as error:
        raise UserError(
            f"{file}: damaged ({error}); run the same propose command again, it drops and recomputes this shard"
        ) from error
