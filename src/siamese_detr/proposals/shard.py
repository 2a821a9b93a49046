"""One shard of a proposal store: an Arrow IPC file with one record batch, written once, never changed.

Any Arrow reader opens it. Columns: ``path`` (relative to the store's image root), ``width`` and ``height`` (pixels,
after the EXIF rotation), ``boxes`` (lists of x1, y1, x2, y2 in pixels), ``scores``, ``crc`` (of the row's other
values). The schema's metadata say how the boxes were made, and which images could not be read.

The columns are memory-mapped. Arrow checks their structure when they are first used, and each row is compared with its
checksum when it is read: a damaged file raises :class:`DamagedShard` and never gives a wrong box.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from siamese_detr.errors import UserError
from siamese_detr.files import written_aside
from siamese_detr.images.shards import as_url

FORMAT = 2
_SCHEMA = pa.schema(
    [
        ("path", pa.large_string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("scores", pa.list_(pa.float32())),
        ("crc", pa.uint32()),
    ]
)


class DamagedShard(UserError):
    """The file is not the shard that was written; ``reason`` says how one knows."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(
            f"{file}: damaged ({reason}); run the same propose command again, it drops and recomputes this shard"
        )
        self.reason = reason


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How the boxes were made: what must agree for more of them to be added.

    Attributes:
        method: "edge-boxes", "selective-search", "random" or a plug-in's.
        parameters: the method's parameters, JSON values.
        image_root: absolute path of the folder the rows' paths are relative to.
    """

    method: str
    parameters: dict[str, Any]
    image_root: str

    @property
    def images_gone(self) -> bool:
        """Whether the images' folder is no longer there."""
        return as_url(self.image_root) is None and not os.path.isdir(self.image_root)

    def key(self) -> str:
        """Hash of how the boxes were made, wherever the images are."""
        return hashlib.sha256(json.dumps([self.method, self.parameters], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The boxes of one image.

    Attributes:
        path: the image: absolute as read from a store, relative to the store's image root as added to it.
        width, height: its size in pixels after the EXIF rotation.
        boxes: float32 (N, 4), x1 y1 x2 y2 in pixels of the rotated image, best first.
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


def write_shard(
    file: Path, settings: StoreSettings, images: Sequence[StoredImage], failures: Mapping[str, str]
) -> None:
    """Write a shard atomically: after a kill or a power cut the file is whole or absent.

    Args:
        file: the shard.
        settings: how the boxes were made.
        images: its rows.
        failures: relative path -> reason, of images without a row.

    Raises:
        OSError: disk full, directory read-only, ...
    """
    offsets = pa.array(np.cumsum([0, *(len(image.scores) for image in images)]), pa.int32())
    sizes = np.array([(image.width, image.height) for image in images], np.int32).reshape(-1, 2)
    boxes = np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes for image in images)])
    scores = np.concatenate([np.zeros(0, np.float32), *(image.scores for image in images)])
    columns = [
        pa.array([image.path for image in images], pa.large_string()),
        pa.array(sizes[:, 0]),
        pa.array(sizes[:, 1]),
        pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(boxes.reshape(-1)), 4)),
        pa.ListArray.from_arrays(offsets, pa.array(scores)),
        pa.array(np.array([image.checksum() for image in images], np.uint32)),
    ]
    facts = {
        "format": FORMAT,
        "settings": asdict(settings),
        "rows": len(images),
        "sizes_crc": zlib.crc32(sizes.tobytes()),
        "failures": dict(failures),
    }
    about = json.dumps(facts).encode()
    schema = _SCHEMA.with_metadata({b"about": about, b"crc": str(zlib.crc32(about)).encode()})
    # Written by Python's file: of a full disk, Arrow's own says no number.
    with (
        written_aside(file, durable=True) as aside,
        open(aside, "wb") as handle,
        pa.ipc.new_file(handle, schema) as writer,
    ):
        writer.write_batch(pa.record_batch(columns, schema=schema))


class Shard:
    """A memory-mapped shard. Opening it reads the metadata only; the columns are checked when first used.

    Attributes:
        rows: how many images it holds.
        settings: how their boxes were made.
        failures: relative path -> reason, of images that could not be read.

    Raises:
        DamagedShard: from the constructor and every method: truncated, changed, or not a shard.
        UserError: the operating system cannot read the file, or another release wrote it.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        with _damage_explained(file):
            # The mapping stays without the descriptor: a store of 10,000 shards must not need 10,000 of them.
            with pa.memory_map(str(file)) as source:
                self._reader = pa.ipc.open_file(source.read_buffer())
            metadata = self._reader.schema.metadata or {}
            about = metadata[b"about"]
            if zlib.crc32(about) != int(metadata[b"crc"]):
                raise ValueError("checksum of its metadata")
            facts = json.loads(about)
            if facts["format"] != FORMAT:
                raise UserError(
                    f"{file} has format {facts['format']!r}, this release reads {FORMAT}: propose into a new directory"
                )
            if not self._reader.schema.equals(_SCHEMA) or self._reader.num_record_batches != 1:
                raise ValueError("not a shard of proposals")
            self.rows, self._sizes_crc, self.failures = facts["rows"], facts["sizes_crc"], facts["failures"]
            self.settings = StoreSettings(**facts["settings"])

    @functools.cached_property
    def paths(self) -> pa.LargeStringArray:
        """Relative paths of all rows."""
        return self._batch.column("path")

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int32 (rows, 2): width and height of every image."""
        sizes = np.stack([self._batch.column("width").to_numpy(), self._batch.column("height").to_numpy()], 1)
        if zlib.crc32(sizes.tobytes()) != self._sizes_crc:
            raise DamagedShard(self._file, "checksum of the image sizes")
        return sizes

    def row(self, index: int) -> StoredImage:
        """A copy of row ``index`` of this shard, compared with its checksum."""
        offsets, boxes, scores, checksums = self._values
        here = slice(offsets[index], offsets[index + 1])
        width, height = self.sizes[index].tolist()
        image = StoredImage(self.paths[index].as_py(), width, height, boxes[here].copy(), scores[here].copy())
        if image.checksum() != checksums[index]:
            raise DamagedShard(self._file, f"checksum of row {index}")
        return image

    def images(self) -> list[StoredImage]:
        """All rows."""
        return [self.row(index) for index in range(self.rows)]

    @functools.cached_property
    def _batch(self) -> pa.RecordBatch:
        with _damage_explained(self._file):
            batch = self._reader.get_batch(0)
            batch.validate(full=True)  # afterwards no length or offset leads out of the file
            if batch.num_rows != self.rows or any(column.null_count for column in batch.columns):
                raise ValueError("rows are missing")
            if not batch.column("boxes").offsets.equals(batch.column("scores").offsets):
                raise ValueError("boxes without scores")
            return batch

    @functools.cached_property
    def _values(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Views of the mapped file: the first box of each row, then their number; all boxes; scores; checksums."""
        boxes, scores = self._batch.column("boxes"), self._batch.column("scores").values
        coordinates = boxes.values.values.to_numpy().reshape(-1, 4)
        return boxes.offsets.to_numpy(), coordinates, scores.to_numpy(), self._batch.column("crc").to_numpy()


@contextlib.contextmanager
def _damage_explained(file: Path) -> Iterator[None]:
    """Turn what Arrow and Python say of a damaged file into `DamagedShard`."""
    try:
        yield
    except FileNotFoundError as error:
        raise DamagedShard(file, "it is missing") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            # The disk's fault, perhaps a passing one, and no reason to drop the shard. Arrow's own have no number.
            raise UserError(f"cannot read {file}: {error.strerror}; check the disk and run again") from error
        raise DamagedShard(file, str(error).partition("\n")[0] or type(error).__name__) from error
