"""The Python examples of the documentation run, in order, on small pictures."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import siamese_detr
from siamese_detr.detectors.build import build_detector
from tiny_finetuning import TINY, learned

ROOT = Path(__file__).parents[2]


def examples(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL | re.M)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the examples take for granted."""
    result, labels = learned()
    shutil.copytree(labels.with_suffix(""), tmp_path / "photos")
    shutil.copytree(result.out / "best", tmp_path / "runs" / "detector")
    for name in ("train.json", "val.json"):
        shutil.copy(labels, tmp_path / name)
    for path in (tmp_path / "photos").iterdir():
        shutil.copy(path, tmp_path)
    detector = build_detector("conditional-detr", class_names=["object"], seed=1, **TINY)
    detector.save(
        tmp_path / "runs" / "pretrained" / "detector",
        shortest_edge=96,
        provenance={"method": "siamese", "pretrained_steps": 8},
    )
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("siamese_detr")
    handlers = logger.handlers[:]
    yield tmp_path
    logger.handlers[:] = handlers


def test_python(place):
    pytest.importorskip("supervision")
    blocks = examples("python.md")
    assert len(blocks) == 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert (place / "found.jpg").is_file()
    assert len(names["rows"]) == 2
    assert (place / "runs" / "memory" / "last").is_dir()


def test_export(place):
    for package in ("onnxruntime", "onnxscript", "openvino"):
        pytest.importorskip(package)
    for runtime in ("onnx", "openvino"):
        siamese_detr.export(model="runs/detector", out=f"runs/{runtime}", format=runtime, quiet=True)
    blocks = examples("export.md")
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/export.md", "exec"), names)
    (expected,) = siamese_detr.load("runs/detector").predict("photos/0.jpg", 0.0)
    assert names["scores"].max() == pytest.approx(expected.scores[0], abs=0.05)  # Pillow resizes a bit differently
