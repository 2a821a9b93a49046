"""Export: what is written computes the same, and mistakes are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from siamese_detr.detectors import build_detector
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.interchange.export import export
from tiny_finetuning import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("export") / "detector"
    detector = build_detector("conditional-detr", class_names=["cat", "dog"], seed=1, **TINY)
    # The last layer of the box head starts at zero, which would hide differences before it.
    torch.nn.init.normal_(detector.model.bbox_predictor.layers[-1].weight, generator=torch.Generator().manual_seed(0))
    detector.save(folder, shortest_edge=64, square=True)
    return str(folder)


def test_a_copy_computes_the_same(model, tmp_path):
    result = export(model=model, out=str(tmp_path / "copy"))
    assert result.difference == 0
    one, other = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "copy" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert Detector.load(tmp_path / "copy").class_names == ["cat", "dog"]


@pytest.mark.parametrize(("precision", "bound"), [("fp16", 0.01), ("bf16", 0.1)])
def test_half_precision_halves_the_file(model, tmp_path, precision, bound):
    whole = export(model=model, out=str(tmp_path / "whole"))
    half = export(model=model, out=str(tmp_path / "half"), precision=precision)
    assert half.bytes < 0.52 * whole.bytes + 100_000
    assert 0 < half.difference < bound


def test_onnx_computes_the_same(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = export(model=model, out=str(tmp_path / "onnx"), format="onnx")
    assert result.difference < 1e-3
    session = onnxruntime.InferenceSession(result.path / "model.onnx", providers=["CPUExecutionProvider"])
    known = json.loads((result.path / "export.json").read_text())
    pixels = np.zeros((5, 3, known["height"], known["width"]), np.float32)
    logits, boxes = session.run(["logits", "pred_boxes"], {"pixel_values": pixels})
    assert logits.shape == (5, TINY["num_queries"], 2)
    assert boxes.shape == (5, TINY["num_queries"], 4)
    assert (result.path / "preprocessor_config.json").exists()


def test_mistakes(model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="itself"):
        export(model=model, out=model)
    with pytest.raises(UserError, match="nowhere"):
        export(model=str(tmp_path / "nowhere"), out=str(tmp_path / "out"))
    for kind in ("onnx", "research"):
        with pytest.raises(UserError, match="has precision fp32, not fp16"):
            export(model=model, out=str(tmp_path / "out"), format=kind, precision="fp16")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"siamese-detr\[onnx\]"):
        export(model=model, out=str(tmp_path / "out"), format="onnx")
    assert not (tmp_path / "out").exists()
