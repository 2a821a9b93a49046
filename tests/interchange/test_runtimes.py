"""Detectors of all families in ONNX Runtime and OpenVINO find the boxes that they find in PyTorch."""

from __future__ import annotations

import json

import numpy as np
import pytest

import siamese_detr
from siamese_detr.detectors.build import families
from siamese_detr.errors import UserError
from tiny_detectors import tiny_detector
from tiny_finetuning import learned, write_scenes

pytest.importorskip("onnxscript")
CLASSES = ["cat", "dog", "cow"]


def saved(family, folder, square=True):
    detector = tiny_detector(family, reduced=False, encoder_layers=1)
    side = 2 * (detector.square_side or 64)
    detector.save(folder, class_names=CLASSES, shortest_edge=side, square=square)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Landscape and portrait."""
    folder = tmp_path_factory.mktemp("photos")
    write_scenes(folder / "wide", 2, size=(120, 96))
    write_scenes(folder / "tall", 2, size=(90, 130))
    return folder


def assert_same_boxes(one, other, images, atol=1e-3):
    """The better half of each image's boxes is among the other's."""
    for ours, theirs in zip(one.predict(images, 0.0, nms=1), other.predict(images, 0.0, nms=1), strict=True):
        rows = [
            np.column_stack([result.scores, result.classes, result.boxes / np.tile(result.size, 2)])
            for result in (ours, theirs)
        ]
        distance = np.abs(rows[0][:, None] - rows[1]).max(-1).min(1)
        assert distance[: max(1, len(distance) // 2)].max() < atol


@pytest.mark.parametrize("family", families())
def test_boxes_are_those_of_pytorch(family, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    model = saved(family, tmp_path / "model")
    out = siamese_detr.export(model=model, out=str(tmp_path / "out"), format="onnx", quiet=True).path
    detector = siamese_detr.load(model, "cpu")
    assert_same_boxes(detector, siamese_detr.load(out), photos)
    openvino = pytest.importorskip("openvino")
    openvino.save_model(openvino.convert_model(out / "model.onnx"), out / "model.xml", compress_to_fp16=False)
    (out / "model.onnx").unlink()
    assert_same_boxes(detector, siamese_detr.load(out), photos)


def test_pictures_keep_their_shape_where_the_detector_keeps_it(photos, tmp_path):
    """The graph has one size: the processor beside it shrinks to fit, and pads."""
    import onnx

    model = saved("conditional-detr", tmp_path / "model", square=False)
    result = siamese_detr.export(
        model=model, out=str(tmp_path / "out"), format="onnx", height=96, width=128, quiet=True
    )
    graph = onnx.load(result.path / "model.onnx")
    shapes = {
        entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
        for entry in graph.graph.input
    }
    assert shapes == {"pixel_values": ["batch", 3, 96, 128], "pixel_mask": ["batch", 96, 128]}
    about = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert about == json.loads((result.path / "export.json").read_text())
    assert (about["class_names"], about["thresholds"], about["scores"]) == (CLASSES, [0.5] * 3, "sigmoid")
    assert (about["height"], about["width"], about["opset"]) == (96, 128, graph.opset_import[0].version)
    exported = siamese_detr.load(result.path)
    assert len(exported.predict(photos, 0.0)) == 4
    inputs = exported.processor(images=[np.zeros((130, 90, 3), np.uint8)], return_tensors="pt")
    assert inputs["pixel_mask"].any(0).any(1).sum() == 96
    assert inputs["pixel_mask"].any(0).any(0).sum() == 66


def test_one_image_a_call(photos, tmp_path):
    model = saved("detr", tmp_path / "model")
    result = siamese_detr.export(model=model, out=str(tmp_path / "out"), format="onnx", dynamic_batch=False, quiet=True)
    assert_same_boxes(siamese_detr.load(model, "cpu"), siamese_detr.load(result.path), photos)
    assert json.loads((result.path / "export.json").read_text())["scores"] == "softmax"


def test_int8_is_measured_by_evaluate(tmp_path):
    pytest.importorskip("nncf")
    run, labels = learned()
    images = str(labels.with_suffix(""))
    result = siamese_detr.export(
        model=str(run.out),
        out=str(tmp_path / "int8"),
        format="openvino",
        precision="int8",
        calibration=images,
        quiet=True,
    )
    assert json.loads((result.path / "export.json").read_text())["class_names"] == ["stripes", "dots"]
    metrics = siamese_detr.evaluate(model=str(result.path), labels=str(labels), quiet=True, workers=0)
    assert metrics.ap50 > 0.3 * run.metrics["AP50"]


def test_mistakes(tmp_path):
    model = saved("detr", tmp_path / "model")
    out = tmp_path / "out"
    with pytest.raises(UserError, match="int8 needs calibration"):
        siamese_detr.export(model=model, out=str(out), format="openvino", precision="int8")
    with pytest.raises(UserError, match="more than 1e-12: not written"):
        siamese_detr.export(model=model, out=str(out), format="onnx", tolerance=1e-12)
    assert not out.exists()
    siamese_detr.export(model=model, out=str(out), format="onnx", quiet=True)
    with pytest.raises(UserError, match="is an export itself"):
        siamese_detr.export(model=str(out), out=str(tmp_path / "again"))
    (out / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(UserError, match="onnxruntime cannot read"):
        siamese_detr.load(out)
