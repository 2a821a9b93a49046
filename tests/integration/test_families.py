"""The whole job, with every detector: pre-train, interrupt, continue, fine-tune, evaluate, predict, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import runs
import siamese_detr
from siamese_detr.detectors import load_detector
from tiny_detectors import CASES, QUERIES, WIDTH, every_detector, tiny_detector
from tiny_finetuning import CLASSES, write_scenes

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")

LR, STEPS = 1e-3, 3
SIZES: dict[str, Any] = dict(
    hidden_size=WIDTH, heads=4, encoder_layers=1, decoder_layers=2, ffn_size=40, num_queries=QUERIES
)
PRETRAIN: dict[str, Any] = {
    **{k: v for k, v in runs.TINY.items() if k not in (*SIZES, "backbone", "steps")},
    **dict(batch_size=2, view_size=96, lr=LR, schedule="constant", save_every=1, keep=0),
}
FINETUNE: dict[str, Any] = dict(
    batch_size=2, lr=LR, backbone_lr=1e-4, schedule="constant", save_every=1, workers=0, device="cpu", progress=False
)
QUIET: dict[str, Any] = dict(workers=0, device="cpu")


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO JSON of four labelled pictures, beside their folder."""
    return write_scenes(tmp_path_factory.mktemp("families") / "scenes", 4)


@pytest.fixture(scope="module")
def store(labels: Path) -> str:
    out = labels.with_name("store")
    siamese_detr.propose(images=str(labels.with_suffix("")), out=str(out), method="random", workers=1)
    return str(out)


def first_detector(case: str, options: dict[str, Any], folder: Path) -> Path:
    """What ``--init`` starts from: built by ``pretrain`` itself, where the family takes a backbone of any kind."""
    family, own = CASES[case]
    if family in ("lw-detr", "rf-detr"):
        detector = tiny_detector(case, classes=1)
        side = 2 * detector.square_side
        detector.save(folder / "start", shortest_edge=side)
        return folder / "start"
    options = {**options, **SIZES, "detector": family, "backbone": runs.TINY["backbone"], "detector_options": own}
    return siamese_detr.pretrain(**options, steps=1, out=str(folder / "start")).detector


def assert_equal(one: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def stock_model(folder: Path) -> Any:
    """The directory, read by plain Transformers: nothing missing, nothing left over."""
    model, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def weights(folder: Path) -> dict[str, Tensor]:
    return stock_model(folder).state_dict()


@every_detector
def test_the_whole_job(case: str, labels: Path, store: str, tmp_path: Path) -> None:
    photos = str(labels.with_suffix(""))
    options = {**PRETRAIN, "images": photos, "proposals": store}
    options["init"] = str(first_detector(case, options, tmp_path))

    # It starts from the detector given: no weight is farther from there than the updates can take it.
    whole = siamese_detr.pretrain(**options, out=str(tmp_path / "whole"), steps=STEPS)
    before, after = weights(Path(options["init"])), weights(whole.detector)
    assert before.keys() == after.keys()
    averages = {name for name in after if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after.keys() - averages}
    assert 0 < max(moved.values()) <= 1.1 * STEPS * LR

    # Interrupted and continued, it ends where the uninterrupted run does.
    part = {**options, "out": str(tmp_path / "part")}
    siamese_detr.pretrain(**part, steps=STEPS - 1)
    siamese_detr.pretrain(**part, steps=STEPS, resume=True)
    assert_equal(tmp_path / "part" / "detector", whole.detector)
    newest = [tmp_path / run / "checkpoints" / f"checkpoint-{STEPS}" for run in ("part", "whole")]
    assert_equal(*newest)

    # Everything but the class head arrives in fine-tuning, and fine-tuning continues exactly too.
    tune = {**FINETUNE, "train": str(labels), "val": str(labels), "model": str(whole.out)}
    still = {"lr": 0.0, "backbone_lr": 0.0, "val": None, "steps": 1}
    untouched = weights(siamese_detr.finetune(**{**tune, **still, "out": str(tmp_path / "still")}).out / "last")
    heads = set(load_detector(whole.detector, list(CLASSES)).load_report.remade)
    assert heads
    # Further groups of queries follow the first.
    first = {name: untouched[name].flatten()[: after[name].numel()] for name in after if name in untouched}
    kept = {name for name in first if torch.equal(after[name].flatten(), first[name])}
    assert after.keys() - kept - averages <= heads  # averages of batch norms follow the pictures at any rate
    assert untouched.keys() >= after.keys()
    tuned = siamese_detr.finetune(**tune, steps=2, out=str(tmp_path / "tuned"))
    siamese_detr.finetune(**tune, steps=1, out=str(tmp_path / "tuned-part"))
    siamese_detr.finetune(**tune, steps=2, out=str(tmp_path / "tuned-part"), resume=True)
    assert_equal(tmp_path / "tuned-part" / "last", tuned.out / "last")
    learned = weights(tuned.out / "last")
    assert all(not torch.equal(learned[name], untouched[name]) for name in heads & learned.keys())

    # The metrics of the file are those of the run; the boxes are those of plain Transformers.
    metrics = siamese_detr.evaluate(model=str(tuned.out / "last"), labels=str(labels), **QUIET).overall()
    assert {name: metrics[name] for name in tuned.last} == pytest.approx(tuned.last, abs=1e-9)
    found = siamese_detr.predict(
        model=str(tuned.out / "last"),
        images=photos,
        out=str(tmp_path / "found"),
        threshold=0.0,
        nms=1.0,
        draw=False,
        **QUIET,
    )
    assert found.class_names == list(CLASSES)
    exported = siamese_detr.export(model=str(tuned.out / "last"), out=str(tmp_path / "exported"))
    assert exported.difference <= 1e-5
    model, processor = stock_model(exported.path), AutoImageProcessor.from_pretrained(exported.path)
    for result in found.results:
        picture = Image.open(result.job.path).convert("RGB")
        with torch.no_grad():
            outputs = model(**processor(images=picture, return_tensors="pt"))
        sizes = torch.tensor([picture.size[::-1]])
        (expected,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
        count = min(len(result.scores), len(expected["scores"]))  # some processors give more than one class a query
        assert count >= QUERIES
        order = expected["scores"].argsort(descending=True, stable=True)[:count]
        np.testing.assert_allclose(result.scores[:count], expected["scores"][order], atol=1e-5)
        np.testing.assert_allclose(result.boxes[:count], expected["boxes"][order], atol=0.05)
