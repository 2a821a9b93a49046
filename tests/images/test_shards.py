"""Images in tar shards, local or behind a URL, give what loose files give."""

from __future__ import annotations

import functools
import http.server
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runs import TINY, logged
from shard_files import Ranges, jpeg, write_tar
from siamese_detr.errors import ImageError, UserError
from siamese_detr.images import shards
from siamese_detr.images.decode import read_image, read_size
from siamese_detr.images.listing import list_images
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.store import ProposalStore


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "siamese-detr" / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of four images each, with labels beside them as WebDataset has it, and one loose image."""
    root = tmp_path / "shards"
    (root / "more").mkdir(parents=True)
    for place, first in (("a.tar", 0), ("more/b.tar", 4)):
        files = {}
        for n in range(first, first + 4):
            # long names take headers of their own
            files |= {f"{'long/' * 30 * (n % 2)}{n}.jpg": jpeg(n), f"{n}.cls": b"1", f"{n}.txt": b""}
        write_tar(root / place, files)
    (root / "c.jpg").write_bytes(jpeg(8))
    return root


def test_members_are_listed_and_read_as_files(folder: Path, cache: Path) -> None:
    images = list_images(folder)
    assert images.problems == []
    assert len(images) == 9
    assert list(images.paths) == sorted(images.paths)
    members = [shards.member_of(path) for path in images.paths]
    assert [member.name.rpartition("/")[2] for member in members if member] == [f"{n}.jpg" for n in range(8)]
    for index, path in enumerate(images.paths):
        number = 8 if path == "c.jpg" else int(path.rpartition("/")[2].rpartition("::")[2].removesuffix(".jpg"))
        file = folder.parent / "loose.jpg"
        file.write_bytes(jpeg(number))
        assert np.array_equal(read_image(images.absolute(index)), read_image(file))
        assert read_size(images.absolute(index)) == read_size(file)
    assert len(list(cache.iterdir())) == 2
    assert list_images(folder) == images  # from the cache
    single = list_images(folder / "a.tar")
    assert [single.absolute(i) for i in range(4)] == [images.absolute(i) for i in range(4)]
    (folder / "list.txt").write_text("\n".join(images.paths[2:5]))
    assert list(list_images(folder / "list.txt").paths) == list(images.paths[2:5])


def test_a_rewritten_shard_is_listed_again(folder: Path) -> None:
    before = list_images(folder)
    write_tar(folder / "a.tar", {"new.png": jpeg(1)})
    after = list_images(folder)
    assert len(after) == len(before) - 3
    with pytest.raises(ImageError):
        read_image(before.absolute(3))


@pytest.mark.promise("shards")
def test_the_same_views_as_from_files(folder: Path, tmp_path: Path) -> None:
    """Proposals and a run of pre-training from shards, stopped and continued, equal those from loose files."""
    from siamese_detr.training.pretrain import pretrain

    rows = [{"bytes": jpeg(n), "path": f"{n}.jpg"} for n in (9, 10)]
    pq.write_table(pa.table({"image": rows}), folder / "d.parquet")
    loose = tmp_path / "loose"
    loose.mkdir()
    images = list_images(folder)
    for index, path in enumerate(images.paths):
        (loose / f"{index:02}.jpg").write_bytes(
            (folder / path).read_bytes() if path == "c.jpg" else shards.read_bytes(images.absolute(index))
        )
    for source, store in ((folder, "a"), (loose, "b")):
        propose(images=str(source), out=str(tmp_path / store), method="edge-boxes", workers=1, max_boxes=20)
    one, other = ProposalStore.open(tmp_path / "a"), ProposalStore.open(tmp_path / "b")
    assert len(one) == len(other) == 11
    for n in range(11):
        assert np.array_equal(one.row(n).boxes, other.row(n).boxes)
    options = TINY | {"steps": 4, "schedule": "constant"}
    pretrain(**options | {"images": str(loose), "proposals": str(tmp_path / "b"), "out": str(tmp_path / "whole")})
    options |= {"images": str(folder), "proposals": str(tmp_path / "a"), "out": str(tmp_path / "stopped")}
    pretrain(**options | {"steps": 2, "workers": 1})
    pretrain(**options | {"resume": True})
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


def test_a_damaged_shard_is_reported(folder: Path) -> None:
    whole = (folder / "a.tar").read_bytes()
    images = list_images(folder)
    (folder / "a.tar").write_bytes(whole[: len(whole) // 2])
    listed = list_images(folder)
    assert 5 <= len(listed) < 9
    assert len(listed.problems) == 1
    assert "a.tar: ends early" in listed.problems[0] or "a.tar: damaged" in listed.problems[0]
    with pytest.raises(ImageError, match="the shard ends early"):
        read_image(images.absolute(3))
    (folder / "a.tar").unlink()
    with pytest.raises(ImageError, match="no such shard"):
        read_image(images.absolute(3))
    (folder / "d.tar.gz").write_bytes(b"")
    assert any("unpack it" in problem for problem in list_images(folder).problems)
    (folder / "e.tar").write_bytes(b"not a tar file" * 100)
    assert any("e.tar: cannot be read" in problem for problem in list_images(folder).problems)
    with pytest.raises(UserError, match=r"no image in .*e\.tar"):
        list_images(folder / "e.tar")


@pytest.mark.promise("hostile-files")
def test_mutated_shards(tmp_path: Path) -> None:
    """Any damage gives images, problems or clean errors, and never takes much memory or time."""
    whole = write_tar(tmp_path / "whole.tar", {f"{n}.jpg": jpeg(n)[:1500] for n in range(3)}).read_bytes()
    path = tmp_path / "mutant.tar"
    for seed in range(400):
        generator = random.Random(seed)
        data = bytearray(whole)
        for _ in range(generator.randint(1, 6)):
            header = generator.choice((0, 2048, 4096)) + generator.randrange(512)
            data[header if generator.random() < 0.8 else generator.randrange(len(data))] = generator.randrange(256)
        path.write_bytes(data[: generator.randint(0, len(data))] if generator.random() < 0.3 else data)
        try:
            images = list_images(path)
        except UserError:
            continue
        for index in range(len(images)):
            try:
                read_image(images.absolute(index))
            except ImageError:
                continue


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """The same folder behind a URL."""
    system = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe(f"/bucket/{file.relative_to(folder)}", file.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("prefix", ["", "simplecache::"])
def test_behind_a_url(folder: Path, memory: str, tmp_path: Path, prefix: str) -> None:
    """Listed, proposed for and found again, as from the folder."""
    from siamese_detr.training.pretrain import pretrain

    url = prefix + memory
    here, there = list_images(folder), list_images(url)
    assert list(there.paths) == list(here.paths)
    for index in range(len(here)):
        assert there.absolute(index).startswith(f"{url}/")
        assert np.array_equal(read_image(there.absolute(index)), read_image(here.absolute(index)))
    report = propose(images=url, out=str(tmp_path / "store"), method="random", workers=1)
    assert (report.images, report.failures) == (9, {})
    store = ProposalStore.open(tmp_path / "store")
    assert store.row(0).path == there.absolute(0)
    assert store.select(list_images(f"{url}/more")).tolist() == list(range(5, 9))
    assert list_images(f"{url}/more/b.tar").absolute(0) == there.absolute(5)
    result = pretrain(**TINY | {"images": url, "proposals": store.directory, "out": str(tmp_path / "run"), "steps": 2})
    assert result.skipped == 0


def test_urls_that_lead_nowhere(memory: str) -> None:
    for url in ("memory://nowhere", "nosuch://bucket", f"{memory}/none.tar", "http://127.0.0.1:9/photos"):
        with pytest.raises(UserError, match=url.split("/")[2]):
            list_images(url)
    with pytest.raises(ImageError, match="no such file"):
        read_image(f"{memory}/none.jpg")


def test_behind_http(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A web server that gives byte ranges serves shards; of one that ignores them, we never take the wrong bytes."""
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        here, there = list_images(folder), list_images(url)
        assert list(there.paths) == list(here.paths)
        assert np.array_equal(read_image(there.absolute(1)), read_image(here.absolute(1)))
        monkeypatch.setattr(Ranges, "ranges", False)
        with pytest.raises(ImageError, match="byte ranges"):
            read_image(there.absolute(1))
        with pytest.raises(UserError, match=r"none\.tar: no such shard"):
            list_images(f"{url}/none.tar")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(UserError, match=r"a\.tar: cannot be read \(.*[Cc]onnect"):
        list_images(f"{url}/a.tar")


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("s3:/bucket/a", "s3://bucket/a"),
        ("simplecache::https:/host/a.tar", "simplecache::https://host/a.tar"),
        ("simplecache::file:/mnt/a", "simplecache::file:///mnt/a"),
        ("file:///mnt/a", "file:///mnt/a"),
        ("/mnt/a", None),
        ("mnt/a.tar::000000000512+3::b", None),
        ("C:/photos", None),
        ("photos", None),
    ],
)
def test_what_is_a_url(path: str, url: str | None) -> None:
    assert shards.as_url(path) == url
    assert url is None or shards.as_url(Path(path)) == url
