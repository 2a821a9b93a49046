"""One shard of a proposal store: an Arrow IPC file with one record batch, written once, never changed.

Any Arrow reader opens it. Columns: ``path`` (relative to the store's image root), ``width`` and ``height`` (pixels,
after the EXIF rotation), ``boxes`` (lists of x1, y1, x2, y2 in pixels), ``scores``, ``crc`` (of the row's other
values). The schema's metadata hold the images that could not be read, with reasons, and checksums.

The columns are memory-mapped. Arrow checks their structure when a shard is opened, and each row is compared with its
checksum when it is read: a damaged file raises :class:`DamagedShard` and never gives a wrong box.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from siamese_detr.errors import UserError
from siamese_detr.files import written_aside

_SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
        ("crc", pa.uint32()),
    ]
)


class DamagedShard(Exception):
    """The file is not the shard that was written."""


@dataclass(frozen=True, slots=True)
class Row:
    """The boxes of one image.

    Attributes:
        path: the image, relative to the store's root, with forward slashes.
        width, height: its size in pixels after the EXIF rotation.
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels of the image, best first.
        scores: float32 (N,).
    """

    path: str
    width: int
    height: int
    boxes: np.ndarray
    scores: np.ndarray

    def checksum(self) -> int:
        head = f"{self.path}\0{self.width}\0{self.height}\0".encode()
        return zlib.crc32(self.scores.tobytes(), zlib.crc32(self.boxes.tobytes(), zlib.crc32(head)))


@dataclass(frozen=True, slots=True)
class Failure:
    """An image without a row, and why.

    Attributes:
        path: the image, relative to the store's root.
        reason: a few words.
    """

    path: str
    reason: str


def write_shard(file: Path, rows: Sequence[Row], failures: Sequence[Failure]) -> None:
    """Write a shard atomically: after a kill or a power cut the file is whole or absent.

    Raises:
        OSError: disk full, directory read-only, ...
    """
    lengths = np.array([len(row.scores) for row in rows], np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    sizes = np.array([(row.width, row.height) for row in rows], np.int32).reshape(-1, 2)
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(row.boxes for row in rows)])
    scores = np.concatenate([np.zeros(0, np.float32), *(row.scores for row in rows)])
    columns = [
        pa.array([row.path for row in rows], pa.string()),
        pa.array(sizes[:, 0]),
        pa.array(sizes[:, 1]),
        pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)),
        pa.ListArray.from_arrays(offsets, pa.array(scores)),
        pa.array(np.array([row.checksum() for row in rows], np.uint32)),
    ]
    facts = json.dumps(
        {
            "rows": len(rows),
            "sizes_crc": _sizes_checksum(sizes[:, 0], sizes[:, 1]),
            "failures": [[failure.path, failure.reason] for failure in failures],
        }
    ).encode()
    schema = _SCHEMA.with_metadata({b"facts": facts, b"crc": str(zlib.crc32(facts)).encode()})
    batch = pa.record_batch(columns, schema=schema)
    with written_aside(file) as aside, open(aside, "wb") as handle:
        with pa.ipc.new_file(handle, schema) as writer:
            writer.write_batch(batch)
        handle.flush()
        os.fsync(handle.fileno())


def _sizes_checksum(widths: np.ndarray, heights: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(heights).tobytes(), zlib.crc32(np.ascontiguousarray(widths).tobytes()))


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    """Turn what Arrow and Python say of a damaged file into `DamagedShard`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedShard("it is missing") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The disk's fault, perhaps a passing one, and no reason to drop the shard. Arrow's own have no number.
            raise UserError(f"cannot read {file}: {error.strerror}; check the disk and run again") from error
        raise DamagedShard(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


class Shard:
    """A memory-mapped shard. Opening it reads the metadata only; the columns are checked when first used.

    Attributes:
        rows: how many images it holds.
        failures: the images that could not be read.

    Raises:
        DamagedShard: from the constructor and every method: truncated, changed, or not a shard.
        UserError: the operating system cannot read the file.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with _damage_named(file):
            # The mapping stays without the descriptor: a store of 10,000 shards must not need 10,000 of them.
            with pa.memory_map(str(file)) as source:
                self._reader = pa.ipc.open_file(source.read_buffer())
            if not self._reader.schema.equals(_SCHEMA) or self._reader.num_record_batches != 1:
                raise DamagedShard("not a shard of proposals")
            metadata = self._reader.schema.metadata or {}
            if zlib.crc32(metadata[b"facts"]) != int(metadata[b"crc"]):
                raise DamagedShard("checksum of its metadata")
            facts = json.loads(metadata[b"facts"])
            self.rows = int(facts["rows"])
            self.failures = tuple(Failure(path, reason) for path, reason in facts["failures"])
            self._sizes_crc = int(facts["sizes_crc"])

    @functools.cached_property
    def _columns(self) -> _Columns:
        with _damage_named(self._file):
            batch = self._reader.get_batch(0)
            batch.validate(full=True)  # afterwards no length or offset leads out of the file
            if batch.num_rows != self.rows or any(column.null_count for column in batch.columns):
                raise DamagedShard("rows are missing")
            boxes, scores = batch.column("boxes"), batch.column("scores")
            columns = _Columns(
                batch.column("path"),
                batch.column("width").to_numpy(),
                batch.column("height").to_numpy(),
                boxes.offsets.to_numpy(),
                boxes.values.values.to_numpy().reshape(-1, 4),
                scores.offsets.to_numpy(),
                scores.values.to_numpy(),
                batch.column("crc").to_numpy(),
            )
            if _sizes_checksum(columns.widths, columns.heights) != self._sizes_crc:
                raise DamagedShard("checksum of the image sizes")
            return columns

    def row(self, index: int) -> Row:
        """A copy of row ``index`` of this shard, compared with its checksum."""
        columns = self._columns
        boxes = columns.boxes[columns.box_offsets[index] : columns.box_offsets[index + 1]].copy()
        scores = columns.scores[columns.score_offsets[index] : columns.score_offsets[index + 1]].copy()
        row = Row(columns.paths[index].as_py(), int(columns.widths[index]), int(columns.heights[index]), boxes, scores)
        if row.checksum() != columns.crc[index]:
            raise DamagedShard(f"checksum of row {index}")
        return row

    def sizes(self) -> np.ndarray:
        """int32 (rows, 2): width and height of every image."""
        return np.stack([self._columns.widths, self._columns.heights], 1)

    def paths(self) -> pa.StringArray:
        """Paths of all rows."""
        return self._columns.paths

    def verify(self) -> None:
        """Read and check everything."""
        for index in range(self.rows):
            self.row(index)


class _Columns(NamedTuple):
    """Arrays that view the mapped file."""

    paths: pa.StringArray
    widths: np.ndarray
    heights: np.ndarray
    box_offsets: np.ndarray
    boxes: np.ndarray
    score_offsets: np.ndarray
    scores: np.ndarray
    crc: np.ndarray
