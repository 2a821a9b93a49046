"""Mutated image and label files: every outcome is a result or a clean error.

A few hundred cases by default; ``SIAMESE_DETR_FUZZ=5000 pytest tests/test_images_fuzz.py`` tries that many of each
kind. Case ``n`` always mutates in the same way: its number in the failure's message reproduces it.
"""

from __future__ import annotations

import copy
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import textured
from label_files import write_voc, write_yolo
from siamese_detr.errors import UserError
from siamese_detr.images import DetectionDataset, list_images, read_image, read_labels, read_size
from siamese_detr.randomness import rng

pytestmark = pytest.mark.promise("hostile-files")

CASES = int(os.environ.get("SIAMESE_DETR_FUZZ", "60"))
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 80},
    "progressive JPEG": {"progressive": True},
    "PNG": {},
    "interlaced GIF": {"interlace": 1},
    "WebP": {},
    "TIFF": {"compression": "tiff_lzw"},
    "raw TIFF": {},
    "BMP": {},
    "PPM": {},
    "AVIF": {"speed": 10},
    "JPEG2000": {},
}
TOKENS: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../..",
    [],
    {},
    [[]],
]
TOKENS += [[None] * 4, {"a": 1}, "\ud800", 2**63, -(2**63), "9" * 400, 1e-320]


def mutate(content: bytes, random: np.random.Generator) -> bytes:
    """Flip, overwrite, cut out, repeat, or cut off some bytes."""
    data = bytearray(content)
    for _ in range(int(random.integers(1, 4))):
        at = int(random.integers(0, max(len(data), 1)))
        # Headers are where the interesting damage is.
        at = at % 64 if random.random() < 0.4 else at
        length = int(random.integers(1, 32))
        match int(random.integers(0, 6)):
            case 0:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ (1 << int(random.integers(0, 8)))])
            case 1:
                data[at : at + length] = random.bytes(length)
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                del data[at:]
            case _:
                data[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"][int(random.integers(0, 3))]
    return bytes(data)


def mutate_json(value: Any, random: np.random.Generator) -> Any:
    """Replace, remove or repeat one element somewhere below ``value``."""
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = keys[int(random.integers(0, len(keys)))]
        action = random.random()
        if action < 0.1:
            del value[key]
        elif action < 0.2 and isinstance(value, list):
            value.insert(int(random.integers(0, len(value))), value[key])
        else:
            value[key] = mutate_json(value[key], random)
        return value
    if type(value) in (int, float) and abs(value) < 1e300 and random.random() < 0.5:
        return float(value * random.normal(0, 10))
    return copy.deepcopy(TOKENS[int(random.integers(0, len(TOKENS)))])


def outcome(call: Callable[[], Any], case: str) -> str:
    """``result``, or ``error`` for a clean one; fails for anything else."""
    message = None
    try:
        call()
    except UserError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
    if message is None:
        return "result"
    assert message.strip(), case
    assert "\n" not in message, case
    return "error"


def check_dataset(dataset: DetectionDataset) -> None:
    assert len({image.id for image in dataset.images}) == len(dataset.images) > 0
    assert len(set(dataset.class_names)) == len(dataset.class_names) == len(dataset.category_ids) > 0
    for image in dataset.images:
        assert image.path.exists()
        assert image.width > 0
        assert image.height > 0
        assert len(image.boxes) == len(image.classes) == len(image.crowd) == len(image.areas)
        assert np.isfinite(image.boxes).all()
        assert (image.boxes[:, :2] >= 0).all()
        assert (image.boxes[:, 2:] <= [image.width, image.height]).all()
        assert (image.boxes[:, 2:] > image.boxes[:, :2]).all()
        assert (image.areas > 0).all()
        assert ((image.classes >= 0) & (image.classes < len(dataset.class_names))).all()
    assert len(dataset.take(0.3, seed=1)) >= 1
    json.dumps(dataset.to_coco(), allow_nan=False)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated_images(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO()
    textured(0, 60, 44).save(buffer, name.split()[-1], **FORMATS[name])
    path = tmp_path / "image"
    outcomes: Counter[str] = Counter()

    def read() -> None:
        min_side = int(random.integers(1, 80)) if random.random() < 0.5 else None
        image = read_image(path, min_side=min_side, max_pixels=4_000_000)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.flags.writeable
        if min_side is None:
            assert read_size(path) == (image.shape[1], image.shape[0])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library grumbles about odd metadata
        for n in range(CASES):
            random = rng(1, n)
            path.write_bytes(mutate(buffer.getvalue(), random))
            outcomes[outcome(read, f"{name}, case {n}")] += 1
            outcome(lambda: read_size(path), f"size of {name}, case {n}")
    print(name, dict(outcomes))
    assert outcomes["error"] > CASES / 10


@pytest.mark.parametrize("kind", ["values", "bytes"])
def test_mutated_coco(coco: Path, kind: str) -> None:
    text = coco.read_text()
    outcomes: Counter[str] = Counter()
    for n in range(2 * CASES):
        random = rng(2, n)
        if kind == "bytes":
            coco.write_bytes(mutate(text.encode(), random))
        else:
            content = json.loads(text)
            for _ in range(int(random.integers(1, 8))):
                content = mutate_json(content, random)
            coco.write_text(json.dumps(content))
        outcomes[outcome(lambda: check_dataset(read_labels(coco)), f"{kind}, case {n}")] += 1
        outcome(lambda: list_images(coco), f"list of {kind}, case {n}")
    print("COCO", kind, dict(outcomes))
    assert outcomes["error"] > 0


def test_mutated_yolo_and_voc(coco: Path, tmp_path: Path) -> None:
    dataset = read_labels(coco)
    yaml = write_yolo(tmp_path / "yolo", dataset)
    voc = write_voc(tmp_path / "voc", dataset)
    split = voc / "ImageSets/Main/train.txt"
    targets = [
        ("data.yaml", yaml, yaml),
        ("YOLO lines", tmp_path / "yolo/labels/train/1.txt", yaml),
        ("VOC XML", voc / "Annotations/1.xml", voc),
        ("VOC split", split, split),
        ("list", tmp_path / "list.txt", None),
    ]
    (tmp_path / "list.txt").write_text("photos/0.jpg\nphotos/1.jpg\n")
    for name, file, source in targets:
        content = file.read_bytes()
        outcomes: Counter[str] = Counter()
        for n in range(CASES):
            file.write_bytes(mutate(content, rng(3, n)))
            if source is None:
                outcomes[outcome(lambda file=file: list_images(file), f"{name}, case {n}")] += 1
            else:
                call = lambda source=source: check_dataset(read_labels(source))  # noqa: E731
                outcomes[outcome(call, f"{name}, case {n}")] += 1
        file.write_bytes(content)
        print(name, dict(outcomes))
        assert outcomes["result"] > 0
