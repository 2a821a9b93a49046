"""One shard of a proposal store: an Arrow IPC file with one record batch, written once, never changed.

Any Arrow reader opens it. Columns: ``path`` (relative to the store's image root), ``width`` and ``height`` (pixels,
after the EXIF rotation), ``boxes`` (lists of x1, y1, x2, y2 in pixels), ``scores``, ``crc`` (of the row's other
values). The schema's metadata hold the images that could not be read, with reasons, and checksums.

Reading is lazy and trusts nothing: opening parses the footer, the columns are memory-mapped, a row is checked against
its checksum when it is read. A file that fails raises :class:`DamagedShard`, never a wrong box.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from siamese_detr.errors import UserError

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
    with atomic_file(file) as handle, pa.ipc.new_file(handle, schema) as writer:
        writer.write_batch(batch)


class atomic_file:
    """``with atomic_file(path) as f``: a binary file that appears under its name only once all of it is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self):
        self._handle = open(self._temporary, "wb")
        return self._handle

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._handle.flush()
                os.fsync(self._handle.fileno())
            self._handle.close()
            if kind is None:
                os.replace(self._temporary, self._path)
                _sync_directory(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    """Make a rename durable. Not every file system (nor Windows) can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _sizes_checksum(widths: np.ndarray, heights: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(heights).tobytes(), zlib.crc32(np.ascontiguousarray(widths).tobytes()))


@dataclass(frozen=True, slots=True)
class ShardFacts:
    """What the footer of a shard tells without reading its columns."""

    rows: int
    sizes_crc: int
    failures: tuple[Failure, ...]


def read_facts(file: Path) -> ShardFacts:
    """Parse and check the footer.

    Raises:
        DamagedShard: truncated, changed, or not a shard.
        UserError: the operating system cannot read the file.
    """
    return _open(file)[1]


def _open(file: Path) -> tuple[pa.RecordBatchFileReader, ShardFacts]:
    try:
        # Read from the mapping without keeping the descriptor: a store of 10,000 shards must not need 10,000 of them.
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source.read_buffer())
        if not reader.schema.equals(_SCHEMA) or reader.num_record_batches != 1:
            raise DamagedShard("not a shard of proposals")
        metadata = reader.schema.metadata or {}
        if zlib.crc32(metadata[b"facts"]) != int(metadata[b"crc"]):
            raise DamagedShard("checksum of its metadata")
        facts = json.loads(metadata[b"facts"])
        failures = tuple(Failure(path, reason) for path, reason in facts["failures"])
        return reader, ShardFacts(int(facts["rows"]), int(facts["sizes_crc"]), failures)
    except FileNotFoundError as error:
        raise DamagedShard("it is missing") from error
    except OSError as error:
        if error.errno is None:  # Arrow's word for a file it cannot parse
            raise DamagedShard(str(error).splitlines()[0]) from error
        # The disk's trouble, perhaps a passing one: no reason to drop the shard.
        raise UserError(f"cannot read {file}: {error.strerror}; mend it and run again") from error
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DamagedShard(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


class Shard:
    """A memory-mapped shard.

    Raises:
        DamagedShard: from the constructor and every method.
    """

    def __init__(self, file: Path) -> None:
        reader, facts = _open(file)
        self.rows = facts.rows
        try:
            batch = reader.get_batch(0)
            if batch.num_rows != facts.rows:
                raise DamagedShard("rows are missing")
            # Views of the mapped file; nothing is read yet. Lengths come from the checked metadata, not the offsets.
            self._paths = batch.column("path")
            self._widths = self._numbers(batch.column("width"))
            self._heights = self._numbers(batch.column("height"))
            self._crc = self._numbers(batch.column("crc"))
            self._box_offsets = self._offsets(batch.column("boxes"))
            self._score_offsets = self._offsets(batch.column("scores"))
            self._boxes = self._numbers(batch.column("boxes").values.values).reshape(-1, 4)
            self._scores = self._numbers(batch.column("scores").values)
            self._path_offsets = self._offsets(self._paths)
            self._path_bytes = self._paths.buffers()[2]
        # SystemError: Python's answer to a length below zero.
        except (pa.ArrowException, OSError, ValueError, TypeError, SystemError) as error:
            raise DamagedShard(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        if _sizes_checksum(self._widths, self._heights) != facts.sizes_crc:
            raise DamagedShard("checksum of the image sizes")

    @staticmethod
    def _numbers(column: pa.Array) -> np.ndarray:
        # Not `to_numpy`: it believes the length that the file tells, and reading beyond the mapping kills the process.
        buffer, kind = column.buffers()[-1], np.dtype(column.type.to_pandas_dtype())
        if buffer is None or len(column) == 0:
            return np.zeros(0, kind)
        return np.frombuffer(buffer, kind, len(column), column.offset * kind.itemsize)

    def _offsets(self, column: pa.Array) -> np.ndarray:
        buffer = column.buffers()[1]
        if self.rows == 0 or buffer is None:
            return np.zeros(self.rows + 1, np.int32)
        return np.frombuffer(buffer, np.int32, self.rows + 1)

    @staticmethod
    def _span(offsets: np.ndarray, index: int, end: int) -> slice:
        first, last = int(offsets[index]), int(offsets[index + 1])
        if not 0 <= first <= last <= end:
            raise DamagedShard(f"offsets of row {index}")
        return slice(first, last)

    def row(self, index: int) -> Row:
        """A checked copy of row ``index`` of this shard."""
        span = self._span(self._path_offsets, index, self._path_bytes.size if self._path_bytes else 0)
        try:
            path = self._path_bytes[span].to_pybytes().decode() if span.start < span.stop else ""
        except UnicodeDecodeError as error:
            raise DamagedShard(f"path of row {index}") from error
        row = Row(
            path,
            int(self._widths[index]),
            int(self._heights[index]),
            self._boxes[self._span(self._box_offsets, index, len(self._boxes))].copy(),
            self._scores[self._span(self._score_offsets, index, len(self._scores))].copy(),
        )
        if row.checksum() != int(self._crc[index]):
            raise DamagedShard(f"checksum of row {index}")
        return row

    def sizes(self) -> np.ndarray:
        """int32 (rows, 2): width and height of every image."""
        return np.stack([self._widths, self._heights], 1)

    def paths(self) -> pa.StringArray:
        """Paths of all rows, structurally valid (offsets and UTF-8 checked)."""
        try:
            self._paths.validate(full=True)
        except pa.ArrowException as error:
            raise DamagedShard(str(error).splitlines()[0]) from error
        return self._paths

    def verify(self) -> None:
        """Read and check everything."""
        self.paths()
        for index in range(self.rows):
            self.row(index)
