"""COCO metrics against hand-made cases, and the evaluation of detectors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from siamese_detr.detectors.build import build_detector
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import Detections, coco_metrics
from siamese_detr.evaluation.evaluate import evaluate, evaluate_detector
from siamese_detr.evaluation.inference import Detector, same_shape_batches
from siamese_detr.evaluation.predict import predict
from siamese_detr.images.labels import read_labels
from siamese_detr.images.names import class_map
from tiny_finetuning import learned

SMALL = dict(hidden_size=16, heads=2, encoder_layers=1, decoder_layers=1, ffn_size=16)


def truth(*annotations: dict) -> dict:
    """Two images, classes 7 (first) and 3."""
    return {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 200, "height": 200} for i in (11, 4)],
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
        "annotations": [{"id": n, **a} for n, a in enumerate(annotations)],
    }


def box(image: int, category: int, x: float, y: float, w: float, h: float, **more) -> dict:
    return {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "area": w * h, **more}


def found(*rows: tuple) -> Detections:
    """Rows of image, class index, score, x1, y1, x2, y2."""
    return Detections.from_rows(np.array(rows, float).reshape(-1, 7))


def test_perfect_detections():
    metrics = coco_metrics(
        truth(box(11, 7, 10, 10, 20, 20), box(11, 3, 50, 50, 60, 60), box(4, 3, 0, 0, 150, 100)),
        found((11, 0, 0.9, 10, 10, 30, 30), (11, 1, 0.8, 50, 50, 110, 110), (4, 1, 0.7, 0, 0, 150, 100)),
    )
    assert metrics.overall() == pytest.approx(dict.fromkeys(metrics.overall(), 1.0))
    assert [(row.name, row.ap, row.boxes) for row in metrics.per_class] == [("seven", 1.0, 1), ("three", 1.0, 2)]


def test_numbers_worked_out_by_hand():
    # Class seven has two boxes. The highest-scored detection is right with IoU 0.8, so at 7 of the 10 thresholds; the
    # next is wrong, the third right with IoU 1. Precision at recall 1/2 is 1, at recall 1 it is 2/3.
    metrics = coco_metrics(
        truth(box(11, 7, 0, 0, 100, 100), box(4, 7, 0, 0, 50, 50)),
        found((11, 0, 0.9, 0, 0, 100, 80), (11, 0, 0.8, 150, 150, 190, 190), (4, 0, 0.7, 0, 0, 50, 50)),
    )
    # COCO samples recall at 101 points: 51 of them are at most 1/2.
    both = (51 * 1 + 50 * 2 / 3) / 101
    # Above IoU 0.80 the first is a false positive too: one right of three, recall 1/2 at precision 1/3.
    one = 51 / 3 / 101
    seven, three = metrics.per_class
    assert seven.ap50 == pytest.approx(both)
    assert seven.ap75 == pytest.approx(both)
    assert seven.ap == pytest.approx((7 * both + 3 * one) / 10)
    assert seven.ar100 == pytest.approx((7 * 1 + 3 * 0.5) / 10)
    assert (three.ap, three.boxes) == (None, 0)  # nothing to find: no number, not 0
    assert metrics.ap == pytest.approx(seven.ap)
    assert metrics.ap_small is None


def test_the_threshold_is_the_score_of_best_f1():
    # Class three has three boxes. By falling score: right, right, wrong, wrong, right: F1 is 1/2, 4/5, 2/3, 4/7, 3/4.
    boxes = [(10, 10, 20, 20), (50, 50, 60, 60), (150, 150, 40, 40)]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    wrong = (100, 0, 110, 9)
    rows = zip((0.91, 0.83, 0.7, 0.6, 0.42), (corners[0], corners[1], wrong, wrong, corners[2]), strict=True)
    metrics = coco_metrics(truth(*(box(11, 3, *b) for b in boxes)), found(*((11, 1, s, *c) for s, c in rows)))
    assert [row.threshold for row in metrics.per_class] == [None, 0.83]


def test_crowds_are_neither_wanted_nor_punished():
    crowd = box(11, 7, 0, 0, 100, 100, iscrowd=1)
    alone = box(11, 7, 120, 120, 40, 40)
    right = (11, 0, 0.5, 120, 120, 160, 160)
    in_crowd = [(11, 0, 0.9, 10, 10, 40, 40), (11, 0, 0.8, 50, 50, 90, 90)]
    assert coco_metrics(truth(crowd, alone), found(*in_crowd, right)).ap == pytest.approx(1)
    assert coco_metrics(truth(alone), found(*in_crowd, right)).ap == pytest.approx(1 / 3)
    assert coco_metrics(truth(crowd, alone), found(right)).per_class[0].boxes == 1


def test_no_detections():
    metrics = coco_metrics(truth(box(11, 7, 0, 0, 50, 50)), Detections.empty())
    assert (metrics.ap, metrics.ar100) == (0.0, 0.0)
    assert "seven" in metrics.to_dict()["classes"][0]["name"]
    metrics.table()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 20))
def test_how_the_work_was_divided_does_not_matter(seed, cut):
    random = np.random.default_rng(seed)
    corners = random.uniform(0, 100, (20, 2))
    rows = np.column_stack(
        [
            random.choice([11, 4], 20), random.integers(0, 2, 20), random.choice([0.2, 0.5, 0.9], 20),
            corners, corners + random.uniform(5, 60, (20, 2)),
        ]
    )  # fmt: skip
    labels = truth(box(11, 7, 10, 10, 50, 50), box(4, 3, 20, 0, 60, 60), box(4, 7, 0, 0, 30, 90))
    whole = coco_metrics(labels, Detections.from_rows(rows))
    parts = [Detections.from_rows(rows[cut:]), Detections.from_rows(rows[:cut])]
    assert coco_metrics(labels, Detections.concatenate(parts)) == whole


def test_only_equal_shapes_share_a_batch():
    shapes = [(4, 3), (3, 4), (4, 3), (4, 3), (3, 4)]
    assert same_shape_batches(shapes, 2) == [[0, 2], [3], [1, 4]]


def test_classes_are_matched_by_name():
    assert class_map(["person", "Dining Table", "zebra"], ["dining_table", "person"]).tolist() == [1, 0, -1]
    assert class_map(["airplane", "tv"], ["tvmonitor", "aeroplane"]).tolist() == [1, 0]
    assert class_map(["LABEL_0", "LABEL_1"], ["cat", "dog"]).tolist() == [0, 1]
    with pytest.raises(UserError, match="no name in common"):
        class_map(["person"], ["cat", "dog"])


def test_evaluation_repeats_what_fine_tuning_measured(tmp_path, capsys):
    result, labels = learned()
    out = tmp_path / "metrics.json"
    # In other batches than the eight of fine-tuning, sums are rounded in another order: nearly equal scores swap.
    for batch_size, apart in ((1, 0.01), (3, 0.01), (8, 1e-6)):
        metrics = evaluate(model=str(result.out), labels=str(labels), out=str(out), batch_size=batch_size, workers=0)
        assert metrics.overall()["AP"] == pytest.approx(result.metrics["AP"], abs=apart)
    assert "stripes" in capsys.readouterr().out
    assert json.loads(out.read_text())["AP50"] == metrics.ap50
    rows = json.loads((tmp_path / "metrics.detections.json").read_text())
    assert {row["category_id"] for row in rows} <= {5, 6}


def test_labels_with_other_class_order_and_foreign_classes(tmp_path):
    result, labels = learned()
    content = json.loads(labels.read_text())
    content["categories"] = [{"id": 9, "name": "ghost"}, {"id": 2, "name": "DOTS"}, {"id": 4, "name": "stripes"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = {5: 4, 6: 2}[annotation["category_id"]]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    metrics = evaluate(model=str(result.out), labels=str(other), images=str(labels.with_suffix("")), workers=0)
    assert metrics.ap == pytest.approx(result.metrics["AP"], abs=1e-6)


@pytest.mark.filterwarnings("ignore:backbone")
def test_images_too_thin_for_the_detector_count_as_missed(tmp_path):
    build_detector("detr", "random:test_efficientnet", num_queries=4, **SMALL).save(
        tmp_path / "model", class_names=["dots"], shortest_edge=96, longest_edge=160
    )
    (tmp_path / "images").mkdir()
    for name, size in (("thin", (3000, 6)), ("whole", (80, 60))):
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.png")
    found_in = predict(
        model=str(tmp_path / "model"), images=str(tmp_path / "images"), out=str(tmp_path / "o"), workers=0
    )
    assert [(Path(path).name, "take 3000x6 pixels" in reason) for path, reason in found_in.skipped] == [
        ("thin.png", True)
    ]
    assert [Path(image.job.path).name for image in found_in.results] == ["whole.png"]


def test_class_names_are_no_markup(tmp_path, capsys):
    rows = coco_metrics(truth(box(11, 7, 0, 0, 9, 9)) | {"categories": [{"id": 7, "name": "[/dev] [red]x"}]}, found())
    Console(width=200).print(rows.table())
    assert "[/dev] [red]x" in capsys.readouterr().out
    result, labels = learned()
    with pytest.raises(UserError, match="is a folder"):
        evaluate(model=str(result.out), labels=str(labels), out=str(tmp_path))


def test_unreadable_images_count_as_missed(tmp_path):
    result, labels = learned()
    folder = tmp_path / "scenes"
    folder.mkdir()
    for path in labels.with_suffix("").iterdir():
        (folder / path.name).write_bytes(path.read_bytes() if path.stem != "0" else b"not a picture")
    (tmp_path / "scenes.json").write_text(labels.read_text())
    detector = Detector.load(result.out)
    found_in = evaluate_detector(detector, read_labels(tmp_path / "scenes.json"))
    assert [Path(path).name for path, _ in found_in.skipped] == ["0.jpg"]
    assert found_in.metrics.per_class[0].boxes == 4
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 8 images"):
        evaluate_detector(detector, read_labels(tmp_path / "scenes.json"))


def test_what_is_left_out_of_the_labels_is_told(tmp_path, capsys):
    result, labels = learned()
    content = json.loads(labels.read_text())
    content["images"][3]["file_name"] = "lost.jpg"
    content["annotations"][5]["bbox"] = [1, 1, 0, 0]
    (tmp_path / "faulty.json").write_text(json.dumps(content))
    evaluate(model=str(result.out), labels=str(tmp_path / "faulty.json"), images=str(labels.with_suffix("")), workers=0)
    said = capsys.readouterr().err
    assert "faulty.json: missing image: 1 (left out)" in said
    assert "faulty.json: box of zero size: 1 (dropped)" in said


@pytest.mark.parametrize("mistake", ["missing", "empty", "no weights", "pickle", "truncated"])
def test_what_is_no_detector_is_named(tmp_path, mistake):
    result, labels = learned()
    folder = tmp_path / "model"
    if mistake != "missing":
        folder.mkdir()
    if mistake not in ("missing", "empty"):
        for name in ("config.json", "preprocessor_config.json"):
            (folder / name).write_bytes((result.out / "best" / name).read_bytes())
    if mistake == "pickle":
        torch.save({}, folder / "pytorch_model.bin")
    if mistake == "truncated":
        (folder / "model.safetensors").write_bytes((result.out / "best" / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="model"):
        evaluate(model=str(folder), labels=str(labels))


SHARED = """
import json, sys, torch
from pathlib import Path
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
from siamese_detr.evaluation.evaluate import evaluate_detector
from siamese_detr.evaluation.inference import Detector
from siamese_detr.images.labels import read_labels
found = evaluate_detector(Detector.load(sys.argv[1]), read_labels(sys.argv[2]), batch_size=2)
result = [found.metrics.ap, len(found.detections)]
Path(sys.argv[3], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(result))
"""


def test_two_processes_measure_the_same(tmp_path):
    result, labels = learned()
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    process = subprocess.run([*command, str(result.out), str(labels), str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    shared = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    alone = evaluate_detector(Detector.load(result.out), read_labels(labels), batch_size=2)
    assert shared == [[alone.metrics.ap, len(alone.detections)]] * 2
