"""The verb propose: complete, the same for any number of workers, and continued after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from siamese_detr import plugins
from siamese_detr.errors import UserError
from siamese_detr.proposals.methods import Method
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.store import ProposalStore


def make_images(folder: Path, numbers: range) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number in numbers:
        generator = np.random.default_rng(number)
        image = np.full((72 + number % 5, 96, 3), generator.integers(0, 256, 3), np.uint8)
        for _ in range(4):
            x, y = generator.integers(0, 64, 2)
            image[y : y + 24, x : x + 20] = generator.integers(0, 256, 3)
        name = f"{number:04d}.png"
        Image.fromarray(image).save(folder / name, compress_level=1)
        names.append(name)
    return names


def contents(directory: Path) -> list[tuple]:
    store = ProposalStore.open(directory)
    rows = [store.row(index) for index in range(len(store))]
    return [(row.path, row.width, row.height, row.boxes.tobytes(), row.scores.tobytes()) for row in rows]


@pytest.mark.parametrize("method", ["edge-boxes", "selective-search", "random"])
def test_every_method_fills_the_store_in_order(tmp_path: Path, method: str) -> None:
    names = make_images(tmp_path / "images", range(5))
    report = propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), method=method, workers=1)
    store = ProposalStore.open(tmp_path / "store")
    assert (report.images, report.computed, report.kept, report.failures) == (5, 5, 0, {})
    assert [store.row(i).path for i in range(5)] == [str(tmp_path / "images" / name) for name in names]
    for index in range(5):
        row = store.row(index)
        assert 0 < len(row.boxes) <= 512
        assert (row.boxes >= 0).all()
        assert (row.boxes[:, 2:] <= [row.width, row.height]).all()
    assert (tmp_path / "store" / "propose.yaml").exists()


class Quarters(Method):
    """A method as a plug-in adds it."""

    def boxes(self, image: np.ndarray, path: str) -> tuple[np.ndarray, np.ndarray]:
        height, width = image.shape[:2]
        return np.array([[0, 0, width / 2, height / 2]], np.float32), np.ones(1, np.float32)


def test_a_plug_in_adds_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load", lambda group: {"quarters": Quarters} if group.endswith("proposals") else {})
    make_images(tmp_path / "images", range(2))
    propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), method="quarters", workers=1)
    store = ProposalStore.open(tmp_path / "store")
    assert store.settings.method == "quarters"
    assert store.row(1).boxes.tolist() == [[0, 0, 48, 36.5]]


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(40))
    for workers in (1, 3):
        propose(images=str(tmp_path / "images"), out=str(tmp_path / f"store{workers}"), workers=workers, shard_size=7)
    assert contents(tmp_path / "store1") == contents(tmp_path / "store3")


def test_random_boxes_depend_on_seed_and_path(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(2))
    for seed in (0, 1):
        propose(images=str(tmp_path / "images"), out=str(tmp_path / f"{seed}"), method="random", seed=seed, workers=1)
    first, other = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert len({row[3] for row in [*first, *other]}) == 4


def test_a_grown_folder_adds_only_what_is_new(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(0, 20, 2))
    propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1, shard_size=4)
    before = contents(tmp_path / "store")
    make_images(tmp_path / "images", range(20))
    report = propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1)
    assert (report.images, report.computed, report.kept) == (20, 10, 10)
    after = contents(tmp_path / "store")
    assert after[:10] == before
    assert len({row[0] for row in after}) == 20
    report = propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1)
    assert (report.computed, report.kept) == (0, 20)


def test_a_list_of_some_images_needs_only_those(tmp_path: Path) -> None:
    names = make_images(tmp_path / "images", range(6))
    coco = {"images": [{"id": i, "file_name": name, "width": 96, "height": 72} for i, name in enumerate(names[2:4])]}
    (tmp_path / "images" / "some.json").write_text(json.dumps(coco))
    report = propose(images=str(tmp_path / "images" / "some.json"), out=str(tmp_path / "store"), workers=1)
    assert (report.images, report.computed) == (2, 2)
    report = propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1)
    assert (report.images, report.computed, report.kept) == (6, 4, 2)


def test_bad_files_among_good_ones_are_listed_and_not_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    names = make_images(folder, range(6))
    whole = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no image")
    (folder / "empty.png").touch()
    Image.new("RGB", (300, 12)).save(folder / "thin.png")
    report = propose(images=str(folder), out=str(tmp_path / "store"), workers=1)
    failed = report.failures
    assert set(failed) == {names[1], "text.jpg", "empty.png", "thin.png"}
    assert failed["thin.png"] == "300x12 pixels, a side below 16"
    assert report.computed == 5
    assert len((tmp_path / "store" / "failures.txt").read_text().splitlines()) == 4
    again = propose(images=str(folder), out=str(tmp_path / "store"), workers=1)
    assert (again.computed, again.kept, len(again.failures)) == (0, 9, 4)
    (folder / names[1]).write_bytes(whole)
    repaired = propose(images=str(folder), out=str(tmp_path / "store"), workers=1, retry_failed=True)
    assert (repaired.computed, len(repaired.failures)) == (1, 3)


def test_nothing_readable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("no")
    with pytest.raises(UserError, match=r"none of its 1 images could be read, the first: a\.jpg"):
        propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1)


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(2))
    options = {"images": str(tmp_path / "images"), "out": str(tmp_path / "store"), "workers": 1}
    propose(**options)
    with pytest.raises(UserError, match=r"max_boxes 512 \(now 20\)"):
        propose(**options, max_boxes=20)
    with pytest.raises(UserError, match=r"method edge-boxes \(now random\)"):
        propose(**options, method="random")
    with pytest.raises(UserError, match="max_boxes must be above 0, not 0"):
        propose(**options, max_boxes=0)
    with pytest.raises(UserError, match="unknown key 'edge_model' in the options of random"):
        propose(**options, method="random", method_options={"edge_model": "x.yml"})


def test_a_featureless_image_is_counted(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(1))
    Image.new("RGB", (80, 40), (9, 9, 9)).save(tmp_path / "images" / "blank.png")
    assert propose(images=str(tmp_path / "images"), out=str(tmp_path / "store"), workers=1).centred == 1


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    make_images(tmp_path / "images", range(9))
    options = {"images": str(tmp_path / "images"), "out": str(tmp_path / "store"), "workers": 1}
    propose(**options, shard_size=3)
    whole = contents(tmp_path / "store")
    shard = tmp_path / "store" / "shard-000001.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    report = propose(**options)
    assert report.computed == 3
    assert len(report.notes) == 1
    assert sorted(contents(tmp_path / "store")) == whole


def started(script: Path, images: Path, store: Path, **options: object) -> subprocess.Popen[str]:
    """A process that proposes with two workers. Its script has no ``__main__`` guard: a plain one must do, too."""
    script.write_text(
        "from siamese_detr.errors import UserError\n"
        "from siamese_detr.proposals.propose import propose\n"
        "try:\n"
        f"    propose(images={str(images)!r}, out={str(store)!r}, workers=2, shard_size=8, **{options!r})\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.DEVNULL, env=environment, text=True)


def until_shards(process: subprocess.Popen[str], store: Path, count: int) -> None:
    """Return once the store has so many shards, or its process has ended."""
    deadline = time.monotonic() + 300
    while process.poll() is None and len(list(store.glob("shard-*.arrow"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_killed_at_any_moment_and_continued(tmp_path: Path) -> None:
    """kill -9 of the whole process, workers included, again and again; the result is that of one quiet run."""
    images, store = tmp_path / "images", tmp_path / "store"
    make_images(images, range(120))
    counts = []
    for more in (1, 4):
        process = started(tmp_path / "run.py", images, store)
        until_shards(process, store, len(list(store.glob("shard-*.arrow"))) + more)
        process.kill()
        process.wait()
        counts.append(len(ProposalStore.open(store)))
    assert 0 < counts[0] <= counts[1]
    report = propose(images=str(images), out=str(store), workers=1, shard_size=8)
    assert report.kept == counts[1]
    assert report.computed == 120 - counts[1]
    propose(images=str(images), out=str(tmp_path / "quiet"), workers=1)
    assert contents(store) == contents(tmp_path / "quiet")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the worker processes in /proc")
@pytest.mark.parametrize("killed", ["a worker", "the run"])
def test_no_process_outlives_a_killed_one(tmp_path: Path, killed: str) -> None:
    """A worker's death ends the run with a message; the run's death ends the workers."""
    images, store = tmp_path / "images", tmp_path / "store"
    make_images(images, range(400))
    process = started(tmp_path / "run.py", images, store, method="selective-search")
    until_shards(process, store, 1)
    workers = [child for child in children(process.pid) if b"spawn_main" in command_of(child)]
    assert len(workers) == 2
    os.kill(workers[0] if killed == "a worker" else process.pid, signal.SIGKILL)
    message, _ = process.communicate(timeout=300)
    if killed == "a worker":
        assert message.startswith("a worker process died")
        assert "run the same command again" in message
    assert len(ProposalStore.open(store)) >= 8
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() and not zombie(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
