"""`siamese_detr.load`: whatever is given to look at, the boxes are those of the verb `predict`."""

from __future__ import annotations

import functools
import http.server
import json
import threading

import numpy as np
import pytest
from PIL import Image

import siamese_detr
from siamese_detr.detectors.build import build_detector
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import CocoMetrics
from tiny_finetuning import learned


@pytest.fixture(scope="module")
def detector():
    return siamese_detr.load(learned()[0].out, "cpu")


@pytest.fixture(scope="module")
def photos():
    return learned()[1].with_suffix("")


def test_every_kind_of_image_gives_the_same_boxes(detector, photos, tmp_path):
    names = [photos / "0.jpg", photos / "1.jpg"]
    told = siamese_detr.predict(
        model=str(learned()[0].out),
        images=str(photos),
        out=str(tmp_path / "out"),
        threshold=0.1,
        draw=False,
        quiet=True,
    )
    pixels = [np.array(Image.open(name)) for name in names]
    url, server = served(photos)
    try:
        for images in (photos, names, [Image.open(name) for name in names], pixels, [str(names[0]), url + "/1.jpg"]):
            found = detector.predict(images, 0.1)
            for ours, theirs in zip(found[:2], told.results[:2], strict=True):
                assert len(ours) > 0
                np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=1e-3)
                assert ours.labels == theirs.labels
                assert ours.size == theirs.size == (120, 96)
    finally:
        server.shutdown()
    (single,) = detector.predict(str(names[0]), 0.1)
    assert single.labels == told.results[0].labels
    rows = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert [row for row in rows if row["image_id"] == 0] == told.results[0].to_coco()


def test_a_picture_is_turned_as_its_exif_says(detector, photos, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(photos / "0.jpg").save(tmp_path / "turned.png", exif=exif)
    (file,) = detector.predict(tmp_path / "turned.png", 0.0)
    (memory,) = detector.predict(Image.open(tmp_path / "turned.png"), 0.0)
    assert file.size == memory.size == (96, 120)
    np.testing.assert_array_equal(file.boxes, memory.boxes)


def test_results_are_drawn_shown_and_converted(detector, photos):
    found = detector.predict(photos, 0.1)
    assert repr(found) == f"<{found.boxes} boxes in 8 images>"
    assert repr(found[0]).startswith(f"<{photos / '0.jpg'}: ")
    assert repr(detector) == "<conditional_detr detector of 2 classes (stripes, dots) on cpu>"
    assert found[0].plot().size == (720, 576)
    assert found._repr_html_().count("data:image/jpeg;base64,") == 8
    assert {row["image_id"] for row in found.to_coco()} == set(range(8))
    supervision = pytest.importorskip("supervision")
    detections = found[0].to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert list(detections.data["class_name"]) == found[0].labels
    np.testing.assert_allclose(detections.xyxy, found[0].boxes, rtol=1e-5)
    assert len(detector.predict(photos / "0.jpg", 1.0)[0].to_supervision()) == 0


def test_metrics_are_shown_in_notebooks():
    result, labels = learned()
    metrics = siamese_detr.evaluate(model=str(result.out), labels=str(labels), workers=0, quiet=True)
    assert f"{100 * metrics.ap50:.1f}" in metrics._repr_html_()
    assert "stripes" in metrics._repr_html_()
    assert f"{100 * result.metrics['AP50']:.1f}" in result._repr_html_()
    assert CocoMetrics.from_dict(metrics.to_dict()).to_dict() == metrics.to_dict()


def test_what_cannot_be_looked_at(detector, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    found = detector.predict([photos / "0.jpg", tmp_path / "cut.jpg", photos / "1.jpg"])
    assert [result.job.id for result in found] == [0, 2]
    assert [path for path, _ in found.skipped] == [str(tmp_path / "cut.jpg")]
    with pytest.raises(UserError, match=r"none of the 1 images"):
        detector.predict(tmp_path / "cut.jpg")
    with pytest.raises(UserError, match="does not exist"):
        detector.predict("nowhere.jpg")
    with pytest.raises(UserError, match=r"image 0 is an array \(3, 8, 8\) of float32: give"):
        detector.predict(np.zeros((3, 8, 8), np.float32))
    with pytest.raises(UserError, match="image 0 is a int"):
        detector.predict(3)
    assert detector.predict([]) == []
    with pytest.raises(UserError, match="threshold must be between 0 and 1"):
        detector.predict(photos, 30)
    build_detector(
        "detr", "random:test_efficientnet", hidden_size=16, heads=2, encoder_layers=1, decoder_layers=1, num_queries=4
    ).save(tmp_path / "run" / "detector", provenance={"method": "siamese", "pretrained_steps": 8})
    with pytest.raises(UserError, match="no classes yet; fine-tune it first"):
        siamese_detr.load(tmp_path / "run")


def served(folder):
    """The address of a folder's files, and the server to shut down."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", server
