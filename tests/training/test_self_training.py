"""Self-training: what the averaged detector finds in unlabelled images becomes labels of their strong views."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from siamese_detr.detectors.structures import Targets
from siamese_detr.errors import UserError
from siamese_detr.training.finetune import finetune
from siamese_detr.training.self_training import Teacher, correct, fallen, pseudo_labels, strong_view
from tiny_finetuning import QUICK, learned, write_scenes

OPTIONS = {**QUICK, "image_size": 96, "eval_every": 0.5, "ema": 0.9, "lr": 1e-4}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlabelled") / "photos"
    write_scenes(folder, 6, seed=4).unlink()
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


class Oracle(torch.nn.Module):
    """A detector of two classes and three queries that always finds the same."""

    class_loss = "focal"
    class_names = ("a", "b")

    def forward(self, images, mask):
        logits = torch.tensor([[[0.1, 0.9], [0.4, 0.2], [0.7, 0.3]], [[0.1, 0.1], [0.2, 0.1], [0.1, 0.8]]]).logit()
        boxes = torch.arange(24.0).view(2, 3, 4) / 24
        return SimpleNamespace(logits=logits[None], boxes=boxes[None])


def test_boxes_above_their_class_s_threshold_become_labels():
    images, mask = torch.zeros(2, 3, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    found = pseudo_labels(Oracle(), images, mask, torch.tensor([0.5, 0.8]))
    assert found.classes.tolist() == [[1, 0], [1, -1]]
    boxes = torch.arange(24.0).view(2, 3, 4) / 24
    torch.testing.assert_close(found.boxes[0], boxes[0, [0, 2]])
    torch.testing.assert_close(found.boxes[1, 0], boxes[1, 2])


def test_pseudo_labels_are_counted_as_correct_once_per_object_and_class():
    box, far = [0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]
    found = Targets(
        torch.tensor([[0, 0, 1, -1], [1, 0, -1, -1]]), torch.tensor([[box, box, far, box], [box, far, far, far]])
    )
    true = Targets(torch.tensor([[0, 1], [0, -1]]), torch.tensor([[box, far], [box, far]]))
    assert correct(found, true).tolist() == [2, 0]
    nothing = Targets(torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 4))
    assert correct(found, nothing).tolist() == correct(nothing, true).tolist() == [0, 0]


def test_the_strong_view_changes_no_geometry():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:50] = 255
    torch.manual_seed(0)
    views = [strong_view()(image).float().mean(0) for _ in range(20)]
    assert len({view.sum().item() for view in views}) > 10
    middle = torch.stack(views).median(0).values > 60
    assert middle[12:28, 22:48].all()
    assert not middle[:8].any()
    assert not middle[:, :17].any()


def test_a_teacher_begins_after_the_burn_in_and_ends_when_it_gets_worse():
    teacher = Teacher(Oracle(), 100, 0.5, None, None)
    records = [{"step": 10 * n, "AP": ap, "thresholds": [n, n]} for n, ap in enumerate((0.1, 0.2, 0.3), 4)]
    assert teacher.thresholds(records[:1]) is None
    assert teacher.thresholds(records[:2]) == [5, 5]
    assert teacher.thresholds(records) == [6, 6]
    worse = [*records, {"step": 70, "AP": 0.26, "thresholds": [7, 7]}]
    assert teacher.thresholds(worse) is None
    assert teacher.thresholds([*worse, {"step": 80, "AP": 0.4, "thresholds": [8, 8]}]) is None
    assert Teacher(Oracle(), 100, 0.0, 0.7, None).thresholds([]) == [0.7, 0.7]
    assert fallen([{"AP": None}, {"AP": 0.1}, {"AP": 0.095}]) is False


@pytest.mark.promise("exact-resume")
def test_a_detector_goes_on_learning_from_unlabelled_images(photos, tmp_path, capsys):
    result, labels = learned()
    options = {**OPTIONS, "train": str(labels), "val": str(labels), "model": str(result.out), "unlabelled": str(photos)}
    options |= {"burn_in": 0.3, "steps": 8, "pseudo_threshold": 0.05, "max_bad_share": 1.0}
    whole = finetune(out=str(tmp_path / "whole"), **options)
    assert "self-training begins" in capsys.readouterr().err
    logged = lines(whole.out / "log.jsonl")
    began = next(record["step"] for record in whole.history if record["step"] >= 0.3 * 8)
    taught = [line["step"] for line in logged if "pseudo_boxes" in line]
    assert taught == list(range(began + 1, 9))
    assert max(line["pseudo_boxes"] for line in logged if "pseudo_boxes" in line) > 0
    assert {Path(line["path"]).name for line in lines(whole.out / "skipped.jsonl")} == {"broken.jpg"}

    cut = tmp_path / "cut"
    finetune(out=str(cut), **{**options, "save_every": 6})
    shutil.rmtree(cut / "checkpoints" / "checkpoint-8")
    again = finetune(out=str(cut), **{**options, "save_every": 6}, resume=True)
    keep = ("step", "loss", "grad_norm", "pseudo_boxes")
    ours, theirs = (
        [{k: line.get(k) for k in keep} for line in lines(run / "log.jsonl")] for run in (again.out, whole.out)
    )
    assert ours == theirs
    assert again.history == whole.history


def test_labels_of_unlabelled_images_only_tell_how_many_pseudo_labels_are_correct(tmp_path):
    result, labels = learned()
    more = write_scenes(tmp_path / "more", 4, seed=5)
    bare = tmp_path / "more.txt"
    bare.write_text("\n".join(map(str, sorted((tmp_path / "more").glob("*.jpg")))))
    options = {**OPTIONS, "train": str(labels), "val": str(labels), "model": str(result.out), "steps": 2, "burn_in": 0}
    logs = []
    for name, source in (("labelled", more), ("bare", bare)):
        finetune(out=str(tmp_path / name), unlabelled=str(source), pseudo_threshold=0.05, **options)
        logs.append(lines(tmp_path / name / "log.jsonl"))
    for labelled, without in zip(*logs, strict=True):
        assert labelled["loss"] == without["loss"]
        assert 0 <= labelled["pseudo_correct"] <= labelled["pseudo_boxes"] == without["pseudo_boxes"]
        assert "pseudo_correct" not in without


def test_self_training_needs_labels_to_be_watched_with(photos, tmp_path):
    _, labels = learned()
    for options in ({"ema": 0.9}, {"val": str(labels)}):
        with pytest.raises(UserError, match="self-training on unlabelled images needs"):
            finetune(train=str(labels), out=str(tmp_path / "run"), unlabelled=str(photos), **options)


def test_thresholds_of_other_classes_are_forgotten(tmp_path):
    result, labels = learned()
    document = json.loads(Path(labels).read_text())
    document["categories"] = [{"id": c["id"], "name": f"other {c['name']}"} for c in document["categories"]]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    images = str(Path(labels).with_suffix(""))
    finetune(train=str(other), train_images=images, model=str(result.out), out=str(tmp_path / "run"), steps=1, **QUICK)
    assert "score_thresholds" not in json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert np.isfinite(json.loads((result.out / "last" / "config.json").read_text())["score_thresholds"]).all()
