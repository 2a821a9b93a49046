"""Images inside Parquet files, as Hugging Face datasets and others store them: one row, one image's encoded bytes.

The bytes are in a column of binary values, or in the field ``bytes`` of a struct; names come from the struct's ``path``
or from a column of names or ids. What a Parquet file lets one read is a row group: a sample costs as much as its group,
so groups should be small (see docs/clusters.md). The last group read is kept: images read in order cost one reading.
"""

from __future__ import annotations

import bisect
import itertools
import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUFFIX = ".parquet"
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")
"""Names of the column of images, where several columns hold bytes."""
NAME_NAMES = ("path", "file_name", "filename", "file", "name", "key", "__key__", "id", "image_id")
"""Names of the column of names."""


@dataclass(frozen=True)
class Layout:
    """Where the images of a file are.

    Attributes:
        metadata: the file's footer.
        image: dotted path of the column of bytes.
        name: dotted path of the column of names, None if there is none.
        starts: first row of each row group, then the number of rows.
    """

    metadata: pq.FileMetaData
    image: str
    name: str | None
    starts: list[int]

    def place(self, row: int) -> tuple[int, int]:
        """The row group that a row is in, and its place there."""
        if not 0 <= row < self.starts[-1]:
            raise IndexError(f"it has {self.starts[-1]} rows")
        group = bisect.bisect_right(self.starts, row) - 1
        return group, row - self.starts[group]


def layout(file: pq.ParquetFile) -> Layout:
    """Find the columns.

    Raises:
        ValueError: none of them holds bytes, or several do and none has a usual name.
    """
    schema = file.schema_arrow
    images: dict[str, str | None] = {}  # column of bytes -> column of names beside it
    for field in schema:
        if is_bytes(field.type):
            images[field.name] = None
        elif pa.types.is_struct(field.type):
            inside = {child.name: child.type for child in field.type}
            if "bytes" in inside and is_bytes(inside["bytes"]):
                has_name = "path" in inside and is_name(inside["path"])
                images[f"{field.name}.bytes"] = f"{field.name}.path" if has_name else None
    if len(images) > 1:
        images = next(({c: n} for name in IMAGE_NAMES for c, n in images.items() if c.split(".")[0] == name), images)
    if len(images) != 1:
        found = f"several: {', '.join(images)}" if images else f"none of {', '.join(schema.names) or 'no columns'}"
        raise ValueError(f"one column must hold the images' bytes, and here is {found}"[:200])
    ((image, name),) = images.items()
    if name is None:
        name = next((n for n in NAME_NAMES if n in schema.names and is_name(schema.field(n).type)), None)
    groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
    if min(groups, default=0) < 0:
        raise ValueError("a group of less than no rows")
    return Layout(file.metadata, image, name, list(itertools.accumulate(groups, initial=0)))


def is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def is_name(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)


def names(source: Any) -> list[str]:
    """The name of each row; its number where it has none that can be shown."""
    size = source.seek(0, os.SEEK_END)
    with reader(source) as file:
        found = layout(file)
        if not 0 <= found.starts[-1] <= size:  # as every image takes a byte
            raise ValueError(f"{found.starts[-1]} rows in {size} bytes")
        values: Iterator[Any] = iter(())
        if found.name is not None:
            values = iter(leaf(file.read([found.name], use_threads=False), found.name).to_pylist())
    given = itertools.chain(values, itertools.repeat(None))
    return [shown(value, row) for row, value in zip(range(found.starts[-1]), given, strict=False)]


def shown(value: Any, row: int) -> str:
    text = posixpath.normpath(f"/{value}")[1:] if value is not None else ""
    return text if text and text.isprintable() else str(row)


def find_layout(source: Any) -> Layout:
    """:func:`layout` of an open file."""
    with reader(source) as file:
        return layout(file)


def column(source: Any, found: Layout, group: int) -> pa.Array:
    """The images' bytes of one row group of an open file."""
    with reader(source, found.metadata) as file:
        return leaf(file.read_row_group(group, [found.image], use_threads=False), found.image)


@contextmanager
def reader(source: Any, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
    # No threads and no reading ahead: both would not survive the fork that data workers come from.
    with pq.ParquetFile(source, metadata=metadata, pre_buffer=False, page_checksum_verification=True) as file:
        yield file


def leaf(table: pa.Table, path: str) -> pa.Array:
    """The column at a dotted path, of a table that was read for it alone."""
    values = table.column(0).combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # of more bytes than one array holds
        values = pa.concat_arrays([chunk.cast(pa.large_binary()) for chunk in values.chunks])
    return values.field(0) if "." in path else values
