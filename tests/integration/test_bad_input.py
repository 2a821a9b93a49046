"""What users get wrong, through the command line: one line that names file and remedy, exit code 2, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import SafetensorError

from conftest import textured
from runs import TINY
from siamese_detr import VERBS, cli
from siamese_detr.detectors import build_detector
from siamese_detr.errors import UserError
from siamese_detr.images.listing import list_images
from siamese_detr.proposals.propose import propose

TUNE = ["--image-size", "64", "--steps", "1", "--workers", "0", "--device", "cpu", "--no-progress"]


def png(width: int, height: int) -> bytes:
    """A grey PNG whose header promises this size; its data end early."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with labels and proposals, a detector, and all that can be wrong with them; nothing here is changed."""
    root = tmp_path_factory.mktemp("world")
    for folder in ("photos", "empty", "text", "unreadable", "odd"):
        (root / folder).mkdir()
    for n in range(4):
        textured(n).save(root / "photos" / f"{n}.jpg")
    (root / "text" / "notes.md").write_text("no image")
    (root / "unreadable" / "a.jpg").write_bytes(b"")
    (root / "unreadable" / "b.png").write_text("no image")

    photo = textured(9)
    grey = np.asarray(photo.convert("L"))
    photo.save(root / "odd" / "good.jpg")
    Image.fromarray(grey.astype(np.uint16) * 257).save(root / "odd" / "sixteen_bit.png")
    photo.convert("CMYK").save(root / "odd" / "cmyk.jpg")
    photo.convert("P").save(root / "odd" / "palette.png")
    photo.save(root / "odd" / "animated.gif", save_all=True, append_images=[photo.rotate(90)])
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(root / "odd" / "turned.jpg", exif=turned)
    Image.new("RGB", (1, 1)).save(root / "odd" / "one_pixel.png")
    (root / "odd" / "huge.png").write_bytes(png(30000, 30000))
    (root / "odd" / "truncated.jpg").write_bytes((root / "odd" / "good.jpg").read_bytes()[:1500])

    categories = [{"id": 1, "name": "cat"}]
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 160, "height": 120} for n in range(4)]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [10, 20, 50, 60]} for n in range(4)]

    def labels(name: str, **changes: Any) -> None:
        content = {"images": images, "annotations": boxes, "categories": categories} | changes
        (root / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    labels("labels.json")
    labels("no_boxes.json", annotations=None)
    labels("no_images.json", images=None)
    labels("lost.json", images=[image | {"file_name": f"lost_{image['file_name']}"} for image in images])
    labels("halved.json", images=[image | {"file_name": f"{n - n % 2 * 9}.jpg"} for n, image in enumerate(images)])
    labels("no_ids.json", images=[{"file_name": image["file_name"]} for image in images])
    labels("outside.json", annotations=[box | {"bbox": [500, 500, 9, 9]} for box in boxes])
    labels("zero.json", annotations=[box | {"bbox": [10, 10, 0, 5]} for box in boxes])
    twice = [*boxes[:2], boxes[2] | {"id": 0}, boxes[3] | {"bbox": [150, 100, 90, 90]}, boxes[0] | {"image_id": 77}]
    labels("faulty.json", annotations=[*twice, boxes[3] | {"bbox": [1, 1, 0, 0]}], images=[*images, images[0]])
    (root / "broken.json").write_text('{"images": [')
    (root / "misspelt.yaml").write_text("imagse: photos\n")
    (root / "wrong.yaml").write_text("batch_size: many\n")
    (root / "list.yaml").write_text("- images\n")
    (root / "weights.pth").write_bytes(b"none")

    propose(images=str(root / "photos"), out=str(root / "store"), method="random", workers=1)
    sizes = {name: TINY[name] for name in ("hidden_size", "heads", "encoder_layers", "decoder_layers", "ffn_size")}
    detector = build_detector("conditional-detr", TINY["backbone"], num_queries=6, class_names=["dog"], **sizes)
    detector.save(root / "detector", shortest_edge=64, square=True)
    return root


PROPOSE = "propose {photos} {out} --method random --workers 1"
PRETRAIN = "pretrain {photos} {out} --proposals {store}"
FINETUNE = "finetune {labels.json} {out} --train-images {photos} --model {detector}"

MISTAKES: dict[str, tuple[str, list[str]]] = {
    # images
    "missing folder": ("propose {gone} {out}", ["gone does not exist", "check the path"]),
    "no images": ("propose {empty} {out}", ["no image in", "empty", "jpg"]),
    "only text": ("pretrain {text} {out}", ["no image in", "text"]),
    "nothing readable": ("propose {unreadable} {out}", ["none of its 2 images", "a.jpg", "failures.txt"]),
    "not one image to predict on": ("predict {detector} {unreadable} {out}", ["none of the 2 images", "a.jpg"]),
    "no detector to predict with": ("predict {empty} {photos} {out}", ["empty is no detector"]),
    "missing picture": ("predict {detector} {gone.jpg} {out}", ["gone.jpg does not exist"]),
    "images of labels lost": ("propose {lost.json} {out}", ["lost.json", "lost_0.jpg", "put the JSON file beside"]),
    # labels
    "no such labels": ("finetune {gone.json} {out}", ["gone.json does not exist"]),
    "not JSON": ("finetune {broken.json} {out}", ["broken.json is not valid JSON", "line 1, column 13"]),
    "no annotations": ("finetune {no_boxes.json} {out}", ["no_boxes.json", "no list 'annotations'"]),
    "no image table": ("evaluate {detector} {no_images.json}", ["no_images.json", "no list 'images'"]),
    "pictures elsewhere": ("finetune {labels.json} {out} --train-images {odd}", ["labels.json", "0.jpg", "odd"]),
    "images without ids": ("finetune {no_ids.json} {out}", ["no_ids.json", "no usable image", "image entry: 4"]),
    "all boxes outside": (
        "finetune {outside.json} {out} --train-images {photos}",
        ["outside.json: no usable box", "outside the image: 4"],
    ),
    "all boxes of zero size": (
        "finetune {zero.json} {out} --train-images {photos}",
        ["zero.json: no usable box", "zero size: 4"],
    ),
    "faulty validation labels": (FINETUNE + " --val {broken.json}", ["broken.json is not valid JSON"]),
    "labels of other things": ("evaluate {detector} {labels.json} --images {photos}", ["(dog)", "(cat)", "in common"]),
    # detectors
    "too few queries": (PRETRAIN + " --num-queries 2", ["2 queries, 3 regions", "raise num_queries"]),
    "unknown detector": (PRETRAIN + " --detector yolo", ["'yolo'", "conditional-detr", "deformable-detr"]),
    "unknown backbone": (PRETRAIN + " --backbone resnt50", ["'resnt50'", "did you mean", "efficientnet-lite0"]),
    "no such weights": (PRETRAIN + " --backbone {gone.pth}", ["gone.pth: no such file"]),
    "weights of nothing": (PRETRAIN + " --backbone {weights.pth}", ["weights.pth"]),
    "no detector": (FINETUNE + " --model {empty}", ["empty is no detector", "config.json"]),
    "no detector to measure": ("evaluate {gone} {labels.json} --images {photos}", ["no detector", "gone"]),
    "no detector to export": ("export {empty} {out}", ["empty is no detector"]),
    "no proposals": (PRETRAIN.replace("{store}", "{empty}"), ["empty: no proposal store", "propose"]),
    "no run": ("report {empty}", ["empty is not a run directory"]),
    "no folder of a run": ("report {gone}", ["gone does not exist"]),
    # places
    "a file as folder": (PROPOSE.replace("{out}", "{labels.json}"), ["labels.json", "another directory"]),
    "a place for no file": ("evaluate {detector} {labels.json} --out /proc/none/m.json", ["/proc/none/m.json"]),
    "a folder in use": (PRETRAIN.replace("{out}", "{text}"), ["text is not empty", "another directory"]),
    # options
    "misspelt option": (PROPOSE + " --metod random", ["--metod", "did you mean --method?", "propose --help"]),
    "misspelt key": ("propose --config {misspelt.yaml}", ["'imagse'", "misspelt.yaml", "did you mean 'images'?"]),
    "wrong value in a file": (PRETRAIN + " --config {wrong.yaml}", ["batch_size='many'", "wrong.yaml"]),
    "no mapping": ("propose --config {list.yaml}", ["list.yaml", "key: value"]),
    "no such file": ("propose --config {gone.yaml}", ["gone.yaml"]),
    "unknown recipe": (PRETRAIN + " --recipe lapptop", ["did you mean 'laptop'?", "imagenet-conditional"]),
    "no out": ("propose {photos}", ["--out is required", "propose --help"]),
    "no number": (PROPOSE + " --seed x", ["--seed", "'x'"]),
    "no choice": ("propose {photos} {out} --method selective", ["'selective'", "'selective-search'"]),
    "impossible number": (FINETUNE + " --fraction 2", ["fraction", "at most 1"]),
    "no such device": ("evaluate {detector} {labels.json} --images {photos} --device gpu", ["'gpu'", "'cpu'"]),
    "unknown command": ("pretrian", ["did you mean 'pretrain'?"]),
}


def command(line: str, world: Path, out: Path) -> list[str]:
    """The arguments of a command: ``{out}`` is a new folder, ``{name}`` something of the world; small sizes added."""
    argv = [
        str(out if word == "{out}" else world / word[1:-1]) if word.startswith("{") else word for word in line.split()
    ]
    given = {word.removeprefix("--").replace("-", "_") for word in argv}
    if argv[0] == "pretrain":
        for name, value in TINY.items():
            if name not in given:
                argv += ["--no-progress"] if name == "progress" else [f"--{name}", str(value)]
    return argv + (TUNE if argv[0] == "finetune" else [])


def mistake(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail as a user's mistake, and return its one line."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = error.splitlines()
    assert [line.startswith("siamese-detr: error: ") for line in lines] == [True], error
    return lines[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_with_the_remedy(name: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line, words = MISTAKES[name]
    before = sorted(world.rglob("*"))
    message = mistake(command(line, world, tmp_path / "out"), capsys)
    assert all(word in message for word in words), message
    assert sorted(world.rglob("*")) == before
    if line.startswith("predict"):
        assert not any((tmp_path / "out").rglob("*"))  # the next run there finds it as it was


def test_strange_images_are_used_or_counted(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["propose", str(world / "odd"), str(tmp_path / "store"), "--method", "random", "--workers", "1"]
    assert cli.main(argv) == 0
    said = capsys.readouterr().err
    assert "proposals of 6 of 9 images" in said
    for name, reason in (("one_pixel.png", "1x1"), ("huge.png", "30000x30000"), ("truncated.jpg", "truncated")):
        assert any(name in line and reason in line for line in said.splitlines()), said
    pretrain = command("pretrain {odd} {out}", world, tmp_path / "run")
    assert cli.main([*pretrain, "--proposals", str(tmp_path / "store"), "--steps", "2"]) == 0
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    assert str(tmp_path / "run" / "detector") in capsys.readouterr().err
    assert cli.main(["predict", str(world / "detector"), str(world / "odd"), str(tmp_path / "found")]) == 0
    written = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(list_images(world / "odd").paths) == 9
    assert "huge.png" in capsys.readouterr().err
    assert written


def test_faulty_labels_are_counted_and_the_rest_used(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "finetune {faulty.json} {out} --train-images {photos} --model {detector} --val {halved.json}"
    assert cli.main(command(f"{line} --val-images {{photos}}", world, tmp_path / "run")) == 0
    said = capsys.readouterr().err
    assert "faulty.json: duplicate image id: 1" in said
    assert "halved.json: missing image: 2 (left out)" in said
    assert "4 training images" in said
    assert str(tmp_path / "run" / "best") in said


def test_a_run_that_never_began_may_begin_with_other_settings(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = PRETRAIN.replace("{store}", "{empty}")
    mistake(command(wrong, world, tmp_path / "run"), capsys)
    argv = command(PRETRAIN, world, tmp_path / "run")
    assert cli.main([*argv, "--lr", "0.01", "--steps", "2"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["lr"] == 0.01
    assert "already holds a run" in mistake(argv, capsys)
    assert "lr: 0.01 -> 0.001" in mistake([*argv, "--resume"], capsys)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("mine: 1")
    assert "holds no run" in mistake(command(PRETRAIN, world, tmp_path / "other"), capsys)
    assert (tmp_path / "other" / "config.yaml").read_text() == "mine: 1"


def test_the_written_configuration_repeats_the_run(world: Path, tmp_path: Path) -> None:
    assert cli.main([*command(PRETRAIN, world, tmp_path / "one"), "--steps", "3"]) == 0
    assert (
        cli.main(["pretrain", "--config", str(tmp_path / "one" / "config.yaml"), "--out", str(tmp_path / "two")]) == 0
    )

    def log(run: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]

    assert log("one") == log("two")


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=lambda failure: type(failure).__name__,
)
def test_a_full_disk_leaves_the_detector_before(
    failure: Exception, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {name: TINY[name] for name in ("hidden_size", "heads", "encoder_layers", "decoder_layers", "ffn_size")}
    detector = build_detector("conditional-detr", TINY["backbone"], num_queries=6, **sizes)
    detector.save(tmp_path / "detector")
    before = {path.name: path.read_bytes() for path in (tmp_path / "detector").iterdir()}

    def fail(*args: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(detector.model, "save_pretrained", fail)
    with pytest.raises(UserError, match=r"cannot save the detector in .*No space left"):
        detector.save(tmp_path / "detector")
    assert {path.name: path.read_bytes() for path in (tmp_path / "detector").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["detector"]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "free disk space"), (errno.EROFS, "choose a place")])
def test_what_the_machine_refuses_is_one_line(
    number: int, remedy: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(name: str, argv: list[str]) -> None:
        raise OSError(number, "refused", "some/file")

    monkeypatch.setattr(cli, "run", refuse)
    message = mistake(["propose"], capsys)
    assert "some/file" in message
    assert remedy in message


@pytest.mark.parametrize("name", VERBS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([name, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--config" in said
    assert "Raises" not in said


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize("arguments", [["--help"], ["check", "-h"], ["pretrain", "-h"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_has_gone_is_no_error(arguments: list[str], buffered: bool) -> None:
    """As of ``siamese-detr check --help | head -1``."""
    program = "import sys; from siamese_detr.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"},
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == ""
    assert process.returncode == 141


@pytest.mark.parametrize("end", [">&-", "2>&-", ">&- 2>&- <&-", "| cat"])
def test_closed_or_narrow_output_ends_no_command_in_a_traceback(end: str) -> None:
    """The program prints what ASCII lacks; its exit code is that of a command that is done."""
    program = "import siamese_detr.cli as c; c.dispatch = lambda argv: print('\\u2026 \\udcff') or 0; "
    program += "raise SystemExit(c.main([]))"
    line = f"set -o pipefail; PYTHONIOENCODING=ascii '{sys.executable}' -c \"{program}\" {end}"
    ended = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    if end == "| cat":
        assert ended.stdout == "\\u2026 \\udcff\n"


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "of a connection")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["check"])
