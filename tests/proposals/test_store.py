"""The proposal store: what is written is read back, and damage never passes for data."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from siamese_detr.errors import ImageError, UserError
from siamese_detr.proposals.shard import StoredImage, StoreSettings
from siamese_detr.proposals.store import ProposalStore
from siamese_detr.proposals.writer import writing

SETTINGS = StoreSettings("edge-boxes", {"max_boxes": 512}, "/pictures")


def make_row(number: int) -> StoredImage:
    generator = np.random.default_rng(number)
    count = number % 7
    boxes = generator.uniform(0, 100, (count, 4)).astype(np.float32)
    scores = generator.uniform(0, 1, count).astype(np.float32)
    return StoredImage(f"folder/bild-ä{number:06d}.jpg", 100 + number, 80, boxes, scores)


def fill(directory: Path, numbers: range, settings: StoreSettings = SETTINGS, **options) -> None:
    with writing(directory, settings, **options) as writer:
        for number in numbers:
            writer.add(make_row(number))


def paths(numbers: range) -> pa.Array:
    return pa.array([make_row(number).path for number in numbers], pa.large_string())


def listed(root: str, paths: list[str]) -> SimpleNamespace:
    return SimpleNamespace(root=Path(root), paths=paths)


def test_round_trip(tmp_path: Path) -> None:
    fill(tmp_path, range(100), shard_size=32)
    store = ProposalStore.open(tmp_path)
    assert len(store) == 100
    assert len(store.shards) == 4
    for number in range(100):
        row, wanted = store.row(number), make_row(number)
        assert row.path == "/pictures/" + wanted.path
        assert (row.width, row.height) == (wanted.width, wanted.height)
        np.testing.assert_array_equal(row.boxes, wanted.boxes)
        np.testing.assert_array_equal(row.scores, wanted.scores)
        assert row.boxes.dtype == row.scores.dtype == np.float32
        assert row.boxes.flags.writeable
    with pytest.raises(IndexError):
        store.row(100)
    with pytest.raises(IndexError):
        store.sizes([100])


def test_sizes_in_any_order(tmp_path: Path) -> None:
    fill(tmp_path, range(50), shard_size=8)
    store = ProposalStore.open(tmp_path)
    rows = np.random.default_rng(0).integers(0, 50, 200)
    np.testing.assert_array_equal(store.sizes(rows), np.stack([100 + rows, np.full(200, 80)], 1))
    np.testing.assert_array_equal(store.sizes()[:, 0], 100 + np.arange(50))
    assert store.sizes([]).shape == (0, 2)


def test_a_pickled_store_is_small_and_reads_the_same(tmp_path: Path) -> None:
    fill(tmp_path, range(50), shard_size=8)
    store = ProposalStore.open(tmp_path)
    store.row(3)
    frozen = pickle.dumps(store)
    assert len(frozen) < 2000
    np.testing.assert_array_equal(pickle.loads(frozen).row(41).boxes, store.row(41).boxes)


def test_continuing_appends_and_keeps_row_numbers(tmp_path: Path) -> None:
    fill(tmp_path, range(10), shard_size=4)
    fill(tmp_path, range(10, 15), shard_size=4)
    store = ProposalStore.open(tmp_path)
    assert [store.row(i).width for i in range(15)] == [100 + i for i in range(15)]


def test_a_moved_image_folder(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    store = ProposalStore.open(tmp_path, image_root="/elsewhere")
    assert store.row(0).path == "/elsewhere/" + make_row(0).path


def test_select_follows_the_list(tmp_path: Path) -> None:
    with writing(tmp_path, SETTINGS, shard_size=8) as writer:
        for number in [*range(20, 40), *range(20)]:  # not in the order of the paths
            writer.add(make_row(number))
        writer.add(ImageError("folder/broken.jpg", "truncated"))
    store = ProposalStore.open(tmp_path)
    numbers = [39, 3, 20, 0, 3]
    paths = [make_row(number).path for number in numbers]
    expected = [19, 23, 0, 20, 23]
    assert store.select(listed("/pictures", paths)).tolist() == expected
    assert store.select(listed("/pictures", [*paths, "folder/broken.jpg"])).tolist() == expected
    # The same files, listed from the folder below or above.
    below = [path.removeprefix("folder/") for path in paths]
    assert store.select(listed("/pictures/folder", below)).tolist() == expected
    assert store.select(listed("/", ["pictures/" + path for path in paths])).tolist() == expected
    with pytest.raises(UserError, match=r"no proposals for 1 of 6 images, the first /pictures/new.jpg; run propose"):
        store.select(listed("/pictures", [*paths, "new.jpg"]))
    with pytest.raises(UserError, match="none of the 1 images"):
        store.select(listed("/pictures", ["folder/broken.jpg"]))


def test_failures_are_kept_and_can_be_forgotten(tmp_path: Path) -> None:
    with writing(tmp_path, SETTINGS, shard_size=3) as writer:
        for number in range(4):
            writer.add(make_row(number))
            writer.add(ImageError(f"bad{number}.jpg", "not an image"))
    assert ProposalStore.open(tmp_path).failures == {f"bad{number}.jpg": "not an image" for number in range(4)}
    with writing(tmp_path, SETTINGS, retry_failed=True):
        pass
    store = ProposalStore.open(tmp_path)
    assert store.failures == {}
    assert [store.row(i).width for i in range(len(store))] == [100, 101, 102, 103]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    with pytest.raises(UserError, match=r"made with max_boxes 512 \(now 100\); give the same, or another"):
        fill(tmp_path, range(0), settings=StoreSettings("edge-boxes", {"max_boxes": 100}, "/pictures"))
    with pytest.raises(UserError, match=r"method edge-boxes \(now random\)"):
        fill(tmp_path, range(0), settings=StoreSettings("random", {"max_boxes": 512}, "/pictures"))


def test_two_writers_are_refused(tmp_path: Path) -> None:
    code = (
        "from siamese_detr.proposals.shard import StoreSettings\n"
        "from siamese_detr.proposals.writer import writing\n"
        f"with writing({str(tmp_path)!r}, StoreSettings('edge-boxes', {{'max_boxes': 512}}, '/pictures')):\n"
        "    pass\n"
    )
    with writing(tmp_path, SETTINGS):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is writing into" in other.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_directory_without_a_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no proposal store there"):
        ProposalStore.open(tmp_path / "absent")
    (tmp_path / "meta.json").write_text('{"format": 1}')
    for use in (ProposalStore.open, lambda directory: fill(directory, range(1))):
        with pytest.raises(UserError, match=r"an earlier release wrote this proposal store.*run propose again"):
            use(tmp_path)


def test_a_truncated_shard_is_reported_dropped_and_replaced(tmp_path: Path) -> None:
    fill(tmp_path, range(12), shard_size=4)
    shard = tmp_path / "shard-000001.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-000001.arrow: damaged .*run the same propose command again"):
        ProposalStore.open(tmp_path)
    with writing(tmp_path, SETTINGS) as writer:
        (dropped,) = writer.dropped
        assert dropped.endswith("dropped, its images are computed again")
        missing = writer.known.find(paths(range(12))) < 0
        assert np.flatnonzero(missing).tolist() == [4, 5, 6, 7]
        for number in np.flatnonzero(missing):
            writer.add(make_row(int(number)))
    store = ProposalStore.open(tmp_path)
    assert sorted(store.row(i).width for i in range(12)) == [100 + i for i in range(12)]


def test_leftovers_of_a_killed_writer_do_not_matter(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    (tmp_path / ".writing-shard-000001.arrow").write_bytes(b"half a shard")
    assert len(ProposalStore.open(tmp_path)) == 4
    fill(tmp_path, range(4, 6))
    assert len(ProposalStore.open(tmp_path)) == 6
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("seed", [*range(4), 1007, 1041])  # a length beyond the file's end, one below zero
def test_mutated_files_give_the_rows_written_or_a_clean_error(tmp_path: Path, seed: int) -> None:
    fill(tmp_path, range(9))
    draw = random.Random(seed)
    shard = tmp_path / "shard-000000.arrow"
    whole = shard.read_bytes()
    harmless, complaints = 0, []
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 8])):
            data[draw.randrange(len(data))] = draw.randrange(256)
        if draw.random() < 0.2:
            del data[draw.randrange(len(data)) :]
        shard.write_bytes(data)
        try:
            store = ProposalStore.open(tmp_path)
            sizes, rows = store.sizes(), [store.row(i) for i in range(len(store))]
            found = store.find(paths(range(9)))
        except UserError as error:
            complaints.append(str(error))
            continue
        harmless += 1
        assert sizes[:, 0].tolist() == [100 + number for number in range(9)]
        assert found.tolist() == list(range(9))
        for row, wanted in zip(rows, map(make_row, range(9)), strict=True):
            np.testing.assert_array_equal(row.boxes, wanted.boxes)
            np.testing.assert_array_equal(row.scores, wanted.scores)
    assert all(str(shard) in complaint and "\n" not in complaint for complaint in complaints)
    assert len(complaints) > 50  # most bytes matter


def test_a_large_store_opens_and_selects_without_python_objects_per_row(tmp_path: Path) -> None:
    number = 200_000
    boxes, scores = np.ones((1, 4), np.float32), np.ones(1, np.float32)
    with writing(tmp_path, SETTINGS, shard_size=50_000) as writer:
        for i in range(number):
            writer.add(StoredImage(f"{i:07d}.jpg", i % 1000 + 1, 7, boxes, scores))
    store = ProposalStore.open(tmp_path)
    assert len(pickle.dumps(store)) < 2000
    sizes = store.sizes()
    np.testing.assert_array_equal(sizes[:, 0], np.arange(number) % 1000 + 1)
    wanted = np.arange(0, number, 3)[::-1]
    np.testing.assert_array_equal(store.select(listed("/pictures", [f"{i:07d}.jpg" for i in wanted])), wanted)
