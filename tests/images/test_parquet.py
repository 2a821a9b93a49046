"""Images in Parquet files, as Hugging Face datasets store them, give what loose files give."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_files import jpeg
from siamese_detr.errors import ImageError, UserError
from siamese_detr.images import shards
from siamese_detr.images.check import check
from siamese_detr.images.decode import read_image
from siamese_detr.images.listing import list_images

pytestmark = pytest.mark.promise("shards")

COUNT = 9


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [jpeg(n) for n in range(COUNT)]


@pytest.fixture
def folder(tmp_path: Path, pictures: list[bytes]) -> Path:
    """Two files: of structs as `datasets` writes them (groups of three rows), and of plain bytes with ids."""
    root = tmp_path / "parquet"
    root.mkdir()
    images = [{"bytes": data, "path": f"{n}.jpg"} for n, data in enumerate(pictures[:5])]
    table = pa.table({"image": images, "label": list(range(5))})
    pq.write_table(table, root / "a.parquet", row_group_size=3)
    plain = {"thumb": [b"no"] * 4, "jpg": pa.array(pictures[5:], pa.large_binary()), "id": [10, 11, 12, 13]}
    pq.write_table(pa.table(plain), root / "b.parquet", compression="zstd")
    return root


@pytest.fixture
def loose(tmp_path: Path, pictures: list[bytes]) -> Path:
    (tmp_path / "loose").mkdir()
    for n, data in enumerate(pictures):
        (tmp_path / "loose" / f"{n}.jpg").write_bytes(data)
    return tmp_path / "loose"


@pytest.mark.parametrize("where", ["folder", "memory", "simplecache"])
def test_rows_are_listed_and_read_as_files(folder: Path, loose: Path, where: str) -> None:
    source: Any = folder
    if where != "folder":
        for file in folder.iterdir():
            fsspec.filesystem("memory").pipe(f"/{folder.name}/{file.name}", file.read_bytes())
        source = f"{'simplecache::' * (where == 'simplecache')}memory://{folder.name}"
    images = list_images(source)
    assert images.problems == []
    assert [path.rpartition("::")[2] for path in images.paths] == [
        *(f"{n}.jpg" for n in range(5)),
        *["10", "11", "12", "13"],
    ]
    order = list(range(COUNT))
    random.Random(0).shuffle(order)
    for n in order:
        assert np.array_equal(read_image(images.absolute(n)), read_image(loose / f"{n}.jpg"))
    assert list_images(source) == images  # from the cache
    one = list_images(f"{source}/b.parquet")
    assert [one.absolute(n) for n in range(4)] == [images.absolute(n) for n in range(5, 9)]


def test_check_reads_rows(folder: Path) -> None:
    assert check(data=str(folder), workers=1, near_duplicates=False).readable == {"data": COUNT}


def test_odd_rows_and_files(folder: Path, tmp_path: Path) -> None:
    images = [{"bytes": None, "path": "http://elsewhere/1.jpg"}, {"bytes": b"text", "path": "a\nb"}]
    pq.write_table(pa.table({"image": images}), folder / "c.parquet")
    pq.write_table(pa.table({"x": [1]}), folder / "d.parquet")
    pq.write_table(pa.table({"left": [b"1"], "right": [b"2"]}), folder / "e.parquet")
    (folder / "f.parquet").write_bytes(b"PAR1 no more PAR1")
    listed = list_images(folder)
    assert len(listed) == COUNT + 2
    assert [problem.split(": ")[0][-9:] for problem in listed.problems] == ["d.parquet", "e.parquet", "f.parquet"]
    assert "several: left, right" in listed.problems[1]
    with pytest.raises(ImageError, match="holds no bytes"):
        read_image(listed.absolute(COUNT))
    with pytest.raises(ImageError, match="not an image"):
        read_image(listed.absolute(COUNT + 1))
    assert listed.paths[-1].endswith("::1")
    for file in ("d", "f"):
        with pytest.raises(UserError, match=rf"no image in .*{file}\.parquet"):
            list_images(folder / f"{file}.parquet")
    pq.write_table(pa.table({"jpg": [b"one"]}), folder / "b.parquet")  # written again, with fewer rows
    with pytest.raises(ImageError, match="1 rows"):
        read_image(listed.absolute(7))
    (folder / "b.parquet").unlink()
    with pytest.raises(ImageError, match="no such shard"):
        read_image(listed.absolute(7))
    assert shards.member_of("a.tar::000000000000::b") is None
    assert shards.member_of("a.parquet::000000000000+1::b") is None


@pytest.mark.promise("hostile-files")
def test_mutated_files(tmp_path: Path, pictures: list[bytes]) -> None:
    """Any damage gives images, problems or clean errors."""
    images = [{"bytes": data[:1500], "path": f"{n}.jpg"} for n, data in enumerate(pictures[:3])]
    pq.write_table(pa.table({"image": images}), tmp_path / "whole.parquet", row_group_size=2)
    whole = (tmp_path / "whole.parquet").read_bytes()
    path = tmp_path / "mutant.parquet"
    for seed in range(int(os.environ.get("SIAMESE_DETR_FUZZ", 400))):
        generator = random.Random(seed)
        data = bytearray(whole)
        for _ in range(generator.randint(1, 6)):
            first = len(data) - 700 if generator.random() < 0.6 else 0  # the footer
            data[generator.randrange(first, len(data))] = generator.randrange(256)
        path.write_bytes(data[: generator.randint(0, len(data))] if generator.random() < 0.1 else data)
        try:
            images_found = list_images(path)
        except UserError:
            continue
        for index in range(min(len(images_found), 10)):
            try:
                read_image(images_found.absolute(index))
            except ImageError:
                continue
