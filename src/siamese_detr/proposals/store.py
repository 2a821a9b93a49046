"""The store of proposals: a directory of immutable Arrow files (`siamese_detr.proposals.shard`).

Row numbers are stable: rows are only ever added at the end (dropping a damaged shard is the one exception). A store
made in one go, interrupted or not, has its rows in the order of the sorted image paths; images added later come after.
Nothing is held in memory per row: 10 million rows cost the mapped pages that are being read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from siamese_detr.errors import UserError
from siamese_detr.images.listing import ImageList
from siamese_detr.proposals.shard import DamagedShard, Shard, StoredImage, StoreSettings

_OPEN_SHARDS = 2**14  # of the 65,530 mappings that Linux allows a process


@dataclass(slots=True)
class ProposalStore:
    """Read access to a store. Pickles to a few bytes per shard, so data workers open it at no cost.

    Attributes:
        directory: where the store is.
        settings: how it was made.
        shards: names of the shard files, in row order.
        starts: int64 (shards + 1,), the first row of each shard, then the number of rows.
        failures: relative path -> reason, of the images that could not be read; they have no row.
    """

    directory: Path
    settings: StoreSettings
    shards: tuple[str, ...]
    starts: np.ndarray
    failures: dict[str, str]
    _open: dict[int, Shard] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: str | Path, image_root: str | Path | None = None) -> ProposalStore:
        """Open a store: reads the shards' metadata, no rows.

        Args:
            directory: what ``propose`` wrote, in one go or in parts.
            image_root: where the images are now, if they moved since.

        Raises:
            UserError: no store there, another format, a part missing, or a damaged shard.
        """
        directory = Path(directory).absolute()
        files = [file for folder in _parts(directory) or [directory] for file in shard_files(folder)]
        if not files:
            raise UserError(f"{directory}: no proposal store there; make one with propose")
        shards = [Shard(file) for file in files]
        settings = shards[0].settings
        for file, shard in zip(files, shards, strict=True):
            if shard.settings != settings:
                raise UserError(f"{file} was made with other settings than {files[0]}: make all parts alike")
        if image_root is not None:
            settings = replace(settings, image_root=os.path.abspath(image_root))
        names = tuple(file.relative_to(directory).as_posix() for file in files)
        starts = np.cumsum([0, *(shard.rows for shard in shards)], dtype=np.int64)
        failures = {path: reason for shard in shards for path, reason in shard.failures.items()}
        return cls(directory, settings, names, starts, failures)

    def __reduce__(self) -> tuple:
        return type(self), (self.directory, self.settings, self.shards, self.starts, self.failures)

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
        image = self._shard(number).row(int(index - self.starts[number]))
        return replace(image, path=os.path.join(self.settings.image_root, image.path))

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
        for number in np.flatnonzero(np.diff(edges)).tolist():
            here = order[edges[number] : edges[number + 1]]
            out[here] = self._shard(number).sizes[wanted[here] - self.starts[number]]
        return out

    def select(self, images: ImageList) -> np.ndarray:
        """int64 (n,): the rows of the given images, in the images' order, without those that failed.

        Raises:
            UserError: images that the store knows nothing of (the message counts them and names the first), none left,
                or a damaged shard.
        """
        paths = pa.array(self.relative_paths(images), pa.large_string())
        rows = self.find(paths)
        unknown = np.flatnonzero((rows < 0) & ~self.failed(paths))
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
        return np.asarray(pc.is_in(paths, value_set=pa.array([*self.failures], pa.large_string())))

    def relative_paths(self, images: ImageList) -> Sequence[str]:
        """The images' paths relative to this store's root (the same objects where the roots agree)."""
        root = os.path.realpath(self.settings.image_root)
        theirs = os.path.realpath(images.root)
        if root == theirs:
            return images.paths
        absolute = (os.path.normpath(os.path.join(theirs, path)) for path in images.paths)
        inside = root.rstrip(os.sep) + os.sep
        return [path.removeprefix(inside).replace(os.sep, "/") for path in absolute]

    def paths(self) -> pa.ChunkedArray:
        """The paths of all rows, relative to the root, in row order: views of the mapped files."""
        return pa.chunked_array([self._shard(n).paths for n in range(len(self.shards))], pa.large_string())

    def find(self, paths: pa.Array) -> np.ndarray:
        """int64 (n,): the row of each path (large strings, relative to the root), -1 where there is none."""
        return np.asarray(pc.index_in(paths, value_set=self.paths()).fill_null(-1)).astype(np.int64)

    def images_key(self, rows: np.ndarray) -> str:
        """Hash of the relative paths of these rows' images, whatever the rows' order."""
        paths = self.paths().take(pa.array(rows))
        paths = paths.take(pc.sort_indices(paths))
        digest = hashlib.sha256()
        for start in range(0, len(paths), 2**16):
            digest.update("".join(f"{path}\n" for path in paths[start : start + 2**16].to_pylist()).encode())
        return digest.hexdigest()

    def _shard(self, number: int) -> Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            file = self.directory / self.shards[number]
            shard = Shard(file)
            if shard.rows != self.starts[number + 1] - self.starts[number]:
                raise DamagedShard(file, "it changed since the store was opened")
            if len(self._open) >= _OPEN_SHARDS:
                self._open.pop(next(iter(self._open)))  # the one unused for longest
        self._open[number] = shard
        return shard


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
    """The shards in a directory, in row order.

    Raises:
        UserError: an earlier release wrote them.
    """
    if (directory / "meta.json").exists():
        raise UserError(
            f"{directory}: an earlier release wrote this proposal store, and this one cannot read it; remove it and "
            "run propose again"
        )
    return sorted(directory.glob("shard-*.arrow"))


def part_name(part: int, parts: int) -> str:
    """The folder, inside a store's, of what one of several machines computes; ``part`` counts from 1."""
    return f"part-{part:05d}-of-{parts:05d}"


def _parts(directory: Path) -> list[Path]:
    """The parts of a store that several machines made, in row order; none if one did."""
    found = sorted(path.name for path in directory.glob("part-*-of-*"))
    if not found or shard_files(directory):
        return []
    count = int(found[0][-5:])
    if missing := sorted({part_name(i, count) for i in range(1, count + 1)} - set(found)):
        raise UserError(f"{directory}: {len(missing)} parts are missing, the first {missing[0]}: run propose for them")
    if len(found) > count:
        raise UserError(f"{directory} holds parts of different divisions: keep one and remove the others")
    return [directory / name for name in found]
