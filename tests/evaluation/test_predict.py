"""Prediction: the boxes of the stock pipeline, pictures, and files that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from siamese_detr.detectors.build import build_detector
from siamese_detr.errors import UserError
from siamese_detr.evaluation.draw import class_colour, draw_detections, label_place
from siamese_detr.evaluation.evaluate import evaluate
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.predict import predict
from siamese_detr.evaluation.results import ImageResult, Job
from siamese_detr.images.labels import read_labels
from siamese_detr.reporting.report import report
from siamese_detr.training.finetune import finetune
from tiny_finetuning import QUICK, learned, write_scenes

PIPELINE = """
import json, sys
from pathlib import Path
from transformers import pipeline
detect = pipeline("object-detection", model=sys.argv[1], device="cpu")
threshold = float(sys.argv[2])
print(json.dumps({Path(path).name: detect(path, threshold=threshold) for path in sys.argv[3:]}))
assert not any(name.startswith("siamese_detr") for name in sys.modules)
"""


def test_the_boxes_are_those_of_the_stock_pipeline(tmp_path):
    result, labels = learned()
    folder = tmp_path / "photos"
    folder.mkdir()
    scenes = sorted(labels.with_suffix("").iterdir())[:3]
    for n, path in enumerate(scenes):  # other sizes, other modes, EXIF rotation
        picture = Image.open(path)
        exif = Image.Exif()
        exif[0x0112] = 6 if n == 0 else 1
        picture.resize((150, 90 + 20 * n)).save(folder / path.name, exif=exif)
    Image.open(scenes[0]).convert("L").save(folder / "grey.png")
    files = sorted(folder.iterdir())
    command = [sys.executable, "-c", PIPELINE, str(result.out / "best"), "0.02", *map(str, files)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env={"HF_HUB_OFFLINE": "1"})
    assert process.returncode == 0, process.stderr[-2000:]
    theirs = json.loads(process.stdout.strip().splitlines()[-1])
    ours = predict(
        model=str(result.out / "best"),
        images=str(folder),
        out=str(tmp_path / "out"),
        threshold=0.02,
        nms=1,
        draw=False,
        workers=0,
    )
    assert sum(map(len, theirs.values())) > 10
    for image, file in zip(ours.results, files, strict=True):
        rest = theirs[file.name]
        assert len(rest) == len(image.scores)
        for k, score, box in zip(image.classes, image.scores, image.boxes, strict=True):
            same = [
                row
                for row in rest
                if row["label"] == ours.class_names[k]
                and abs(row["score"] - score) < 1e-5
                # The pipeline cuts coordinates to whole pixels.
                and np.abs(np.trunc(box) - list(row["box"].values())).max() <= 1
            ]
            assert same, (file.name, score, box)
            rest.remove(same[0])


def test_of_two_boxes_of_a_class_on_one_object_the_better_one_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [0, 0, 10, 5]], float)
    result = ImageResult(Job(0, "a"), (20, 20), np.array([0, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.6]), boxes)
    assert result.without_duplicates(0.8).scores.tolist() == [0.9, 0.7, 0.6]
    assert result.without_duplicates(1).scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert len(ImageResult(Job(0, "a")).without_duplicates(0.8)) == 0


def test_files_written(tmp_path):
    result, labels = learned()
    out = tmp_path / "out"
    found = predict(model=str(result.out), images=str(labels), out=str(out), threshold=0.1, batch_size=3, workers=0)
    content = json.loads((out / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"{n}.jpg" for n in range(8)]
    assert sum(len(image["objects"]) for image in content["images"]) == found.boxes > 0
    one = next(thing for image in content["images"] for thing in image["objects"])
    assert one["label"] in found.class_names
    assert one["score"] > 0.1
    rows = json.loads((out / "coco_results.json").read_text())
    assert len(rows) == found.boxes
    assert set(rows[0]) == {"image_id", "category_id", "bbox", "score"}
    pictures = sorted((out / "pictures").iterdir())
    assert [path.name for path in pictures] == [f"{n}.jpg" for n in range(8)]
    assert max(Image.open(pictures[0]).size) >= 640


def test_the_threshold_is_the_one_stored_with_the_detector(tmp_path):
    result, labels = learned()
    best = max(result.history, key=lambda record: record["AP"])
    thresholds = json.loads((result.out / "best" / "config.json").read_text())["score_thresholds"]
    assert thresholds == best["thresholds"]
    assert all(0 < value < 1 for value in thresholds)
    options = {"model": str(result.out), "images": str(labels), "nms": 1, "workers": 0, "draw": False}
    everything = predict(**options, out=str(tmp_path / "all"), threshold=0.0)
    found = predict(**options, out=str(tmp_path / "found"))
    for ours, image in zip(found.results, everything.results, strict=True):
        wanted = image.scores >= np.array(thresholds)[image.classes]
        assert (ours.scores == image.scores[wanted]).all()
    assert json.loads((tmp_path / "found" / "predictions.json").read_text())["thresholds"] == dict(
        zip(found.class_names, thresholds, strict=True)
    )


def test_the_images_themselves_are_never_written_over(tmp_path):
    result, labels = learned()
    photo = (labels.with_suffix("") / "1.jpg").read_bytes()
    for path in ("photos/a.jpg", "photos/a.jpeg", "photos/a.JPG", "photos/a.JPG.jpg", "else/where/pictures/a.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(photo)
    names = ["../../photos/a.jpg", "../../photos/a.jpeg", "../../photos/a.JPG", "../../photos/a.JPG.jpg"]
    names += [str(tmp_path / "else/where/pictures/a.jpg")]
    (tmp_path / "labels" / "coco").mkdir(parents=True)
    (tmp_path / "labels" / "coco" / "new.json").write_text(json.dumps({"images": [{"file_name": n} for n in names]}))
    options = {"model": str(result.out), "workers": 0}
    predict(images=str(tmp_path / "labels/coco/new.json"), out=str(tmp_path / "out"), **options)
    drawn = {path.name for path in (tmp_path / "out" / "pictures" / "photos").iterdir()}
    assert drawn == {"a.jpg", "a.jpeg.jpg", "a.JPG.jpg.jpg", "a.JPG.jpg"}
    assert (tmp_path / "out/pictures/else/where/pictures/a.jpg").is_file()
    predict(images=str(tmp_path / "else/where"), out=str(tmp_path / "else/where"), **options)
    predict(images=str(tmp_path / "else/where/pictures/a.jpg"), out=str(tmp_path / "else/where"), **options)
    assert {path.name for path in (tmp_path / "else/where/pictures").rglob("*.jpg")} == {"a.jpg", "a.jpg.jpg"}
    originals = [*(tmp_path / "photos").iterdir(), tmp_path / "else/where/pictures/a.jpg"]
    assert all(path.read_bytes() == photo for path in originals)
    assert len(originals) == 5


def test_the_batch_makes_no_difference(tmp_path):
    result, _ = learned()
    write_scenes(tmp_path / "a" / "wide", 2, size=(140, 90), seed=1)
    write_scenes(tmp_path / "a" / "tall", 3, size=(90, 130), seed=2)
    options = {"model": str(result.out), "images": str(tmp_path / "a"), "threshold": 0.01, "nms": 1, "draw": False}
    one = predict(**options, out=str(tmp_path / "one"), batch_size=1, workers=0)
    many = predict(**options, out=str(tmp_path / "many"), batch_size=4, workers=2, top_k=5)
    for single, shared in zip(one.results, many.results, strict=True):
        assert single.job.path == shared.job.path
        assert len(shared.scores) <= 5
        np.testing.assert_allclose(single.scores[:5], shared.scores, atol=1e-5)
        np.testing.assert_allclose(single.boxes[:5], shared.boxes, atol=1e-2)


def test_unreadable_images_are_listed(tmp_path, capsys):
    result, labels = learned()
    folder = tmp_path / "photos"
    folder.mkdir()
    good = (labels.with_suffix("") / "0.jpg").read_bytes()
    (folder / "good.jpg").write_bytes(good)
    (folder / "cut.jpg").write_bytes(good[:600])
    (folder / "text.png").write_text("no picture")
    with open(os.fsencode(folder) + b"/\xff.jpg", "wb") as file:
        file.write(good)
    found = predict(model=str(result.out), images=str(folder), out=str(tmp_path / "out"), workers=0)
    assert len(found.results) == 1
    assert [path.rpartition("/")[2] for path, _ in found.skipped] == ["cut.jpg", "text.png"]
    listed = json.loads((tmp_path / "out" / "predictions.json").read_text())["skipped"]
    assert [row["path"].rpartition("/")[2] for row in listed] == ["cut.jpg", "text.png"]
    said = " ".join(capsys.readouterr().err.split())
    assert "2 unreadable" in said
    assert "name is not Unicode" in said
    (folder / "good.jpg").unlink()
    with pytest.raises(UserError, match="none of the 2 images"):
        predict(model=str(result.out), images=str(folder), out=str(tmp_path / "none"), workers=0)


def test_a_single_file_and_mistakes(tmp_path):
    result, labels = learned()
    file = labels.with_suffix("") / "1.jpg"
    found = predict(model=str(result.out / "last"), images=str(file), out=str(tmp_path / "out"), workers=0)
    assert [image.job.path for image in found.results] == [str(file)]
    with pytest.raises(UserError, match="threshold"):
        predict(model=str(result.out), images=str(file), out=str(tmp_path / "out"), threshold=1.5)
    with pytest.raises(UserError, match="batch_size must be above 0"):
        predict(model=str(result.out), images=str(file), out=str(tmp_path / "out"), batch_size=0)
    with pytest.raises(UserError, match="workers must be 0 or more"):
        evaluate(model=str(result.out), labels=str(labels), workers=-1)
    with pytest.raises(UserError, match="top_k must be at most 100"):
        evaluate(model=str(result.out), labels=str(labels), top_k=101)
    with pytest.raises(UserError, match="nowhere"):
        predict(model=str(result.out), images=str(tmp_path / "nowhere"), out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="device"):
        predict(model=str(result.out), images=str(file), out=str(tmp_path / "out"), device="abacus")


def test_a_detector_that_was_only_pretrained_has_no_classes_yet(tmp_path):
    _, labels = learned()
    sizes = {"hidden_size": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4}
    detector = build_detector("detr", "random:test_efficientnet", **sizes)
    detector.save(tmp_path / "run" / "detector", provenance={"method": "siamese", "pretrained_steps": 8})
    model, message = str(tmp_path / "run"), "no classes yet; fine-tune it first"
    with pytest.raises(UserError, match=message):
        evaluate(model=model, labels=str(labels))
    with pytest.raises(UserError, match=message):
        predict(model=model, images=str(labels), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    detector.save(tmp_path / "run" / "best", class_names=["object"], provenance={"finetuned": {"steps": 8}})
    assert Detector.load(model, "cpu").class_names == ["object"]


def test_drawing_leaves_the_inside_of_boxes_and_colours_classes():
    image = np.full((400, 700, 3), 200, np.uint8)
    boxes = np.array([[50, 100, 250, 300], [300, 100, 600, 350]])
    picture = np.asarray(draw_detections(image, boxes, np.array([0, 1]), np.array([0.9, 0.4]), ["cat", "dog"]))
    assert picture.shape == image.shape
    assert (picture[150:250, 100:200] == 200).all()
    assert tuple(picture[200, 50]) == class_colour(0) != class_colour(1) == tuple(picture[200, 300])
    assert (np.asarray(draw_detections(image, np.zeros((0, 4)), np.zeros(0, int), None, [])) == image).all()


def test_labels_stay_in_the_picture_and_apart():
    taken: list = []
    for box in ([0, 0, 80, 60], [2, 1, 90, 60], [620, 5, 639, 100]):
        place = label_place(np.array(box, float), (70, 16), (640, 480), taken)
        assert min(place) >= 0
        assert place[2] <= 640
        assert place[3] <= 480
        for other in taken:
            width = min(place[2], other[2]) - max(place[0], other[0])
            height = min(place[3], other[3]) - max(place[1], other[1])
            assert width <= 0 or height <= 0
        taken.append(place)


@pytest.mark.parametrize("form", ["coco", "voc", "yolo"])
def test_what_is_found_becomes_labels_to_learn_from(tmp_path, form):
    result, labels = learned()
    photos = write_scenes(tmp_path / "photos", 3, seed=1).with_suffix("")
    (photos / "broken.jpg").write_bytes(b"")
    out = tmp_path / "out"
    options = {"model": str(result.out), "images": str(photos), "out": str(out), "workers": 0, "draw": False}
    found = predict(**options, threshold=0.02, labels=form)
    dataset = read_labels(out / "labels")
    scores = {image.path.name: image.scores for image in dataset.images}
    assert 0 < len(dataset) <= 3
    for image in found.results:
        kept = scores.get(os.path.basename(image.job.path), np.zeros(0))
        np.testing.assert_allclose(np.sort(kept), np.sort(image.scores)[len(image) - len(kept) :], atol=1e-4)
    with pytest.raises(UserError, match="corrected by hand"):
        predict(**options, labels=form)
    predict(**options | {"out": str(tmp_path / "nothing")}, threshold=1.0, labels=form)
    assert not (tmp_path / "nothing/labels").exists()

    run = tmp_path / "run"
    finetune(train=[str(labels), str(out / "labels")], model=str(result.out), out=str(run), steps=1, **QUICK)
    start = json.loads((run / "start.json").read_text())
    assert start["boxes"] == 8 + start["pseudo_labels"] == 8 + dataset.class_counts()[:, 0].sum()
    report(run, samples=1)
    told = f"{start['pseudo_labels']} of {start['boxes']} boxes are pseudo-labels"
    assert told in (run / "report.html").read_text()


def test_labels_of_images_in_shards_are_refused_before_any_work(tmp_path):
    result, labels = learned()
    with tarfile.open(tmp_path / "photos.tar", "w") as shard:
        shard.add(labels.with_suffix("") / "0.jpg", "0.jpg")
    options = {"model": str(result.out), "images": str(tmp_path / "photos.tar"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match="unpack the shards"):
        predict(**options, labels="coco")
    assert not (tmp_path / "out").exists()
