"""Detectors as directories: what is written is an ordinary Hugging Face model, and what cannot be read is explained."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, AutoModelForObjectDetection, ResNetConfig, ResNetModel, pipeline

from siamese_detr.detectors import build_detector, load_detector
from siamese_detr.detectors.weights import read_checkpoint
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.interchange.export import export
from tiny_detectors import every_detector, fitting_side, tiny_backbone, tiny_detector


@pytest.fixture
def saved(tmp_path):
    tiny_detector("conditional-detr").save(tmp_path / "model", class_names=["a", "b", "c"])
    return tmp_path / "model"


@every_detector
def test_stock_classes_read_the_directory(case, tmp_path):
    detector = tiny_detector(case).eval()
    side = fitting_side(detector)
    detector.save(tmp_path, class_names=["ant", "bee", "cow"], shortest_edge=side, square=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    inputs = processor(images=picture, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, side, side)
    with torch.no_grad():
        stock = AutoModelForObjectDetection.from_pretrained(tmp_path)(**inputs)
        mask = torch.ones(1, side, side, dtype=torch.bool)
        ours = detector(inputs["pixel_values"], mask)
    assert_close(stock.pred_boxes, ours.boxes[-1], rtol=1e-5, atol=1e-6)
    assert_close(stock.logits, ours.logits[-1], rtol=1e-5, atol=1e-5)
    answers = pipeline("object-detection", model=str(tmp_path))(picture, threshold=0.0)
    assert {answer["label"] for answer in answers} <= {"ant", "bee", "cow"}
    best = processor.post_process_object_detection(stock, threshold=0.0, target_sizes=[(60, 80)])[0]
    assert_close(max(answer["score"] for answer in answers), best["scores"].max().item())


def test_the_directory_needs_none_of_our_code(saved):
    script = (
        "import sys, transformers\n"
        "model = transformers.AutoModelForObjectDetection.from_pretrained(sys.argv[1])\n"
        "assert not any(name.startswith('siamese_detr') for name in sys.modules)\n"
        "print(sorted(model.config.id2label.values()))"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script, saved], env=environment, capture_output=True, text=True)
    assert run.stdout.strip() == "['a', 'b', 'c']", run.stderr


def test_whoever_may_read_new_files_may_read_the_detector(saved, tmp_path):
    (tmp_path / "new").touch()
    export(model=str(saved), out=str(tmp_path / "copy"))
    modes = {file.name: file.stat().st_mode for folder in (saved, tmp_path / "copy") for file in folder.iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "new").stat().st_mode)


def test_normalisation_of_the_backbone_is_the_processors(tmp_path):
    detector = build_detector("detr", "efficientnet-lite0", hidden_size=32, heads=4, encoder_layers=1, decoder_layers=1)
    detector.save(tmp_path, shortest_edge=256, longest_edge=300)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert_close(stored["image_mean"], [127 / 255] * 3)
    assert_close(stored["image_std"], [128 / 255] * 3)
    assert stored["size"] == {"shortest_edge": 256, "longest_edge": 300}
    loaded = load_detector(tmp_path)
    assert loaded.image_mean == detector.image_mean
    assert loaded.input_size == {"shortest_edge": 256, "longest_edge": 300}
    assert loaded.provenance == {"family": "detr", "backbone": "efficientnet-lite0"}


def test_square_families_take_sides_that_fit():
    detector = tiny_detector("rt-detr")
    assert dict(detector.image_processor(shortest_edge=128, longest_edge=200).size) == {"height": 128, "width": 128}
    with pytest.raises(UserError, match="multiple of 32"):
        detector.image_processor(shortest_edge=100)


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    other = tiny_detector("conditional-detr", classes=5)

    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(other.model), "save_pretrained", full)
    with pytest.raises(UserError, match="No space left"):
        other.save(saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_is_no_detector_is_refused(saved):
    ResNetModel(ResNetConfig(**tiny_backbone().to_dict())).save_pretrained(saved)
    with pytest.raises(UserError, match=r"'resnet' model; known detectors: .*conditional-detr"):
        load_detector(saved)


@pytest.mark.promise("no-code")
def test_unreadable_directories_are_explained(saved, tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        load_detector(tmp_path)
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot load the weights"):
        load_detector(saved)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is needed"):
        load_detector(saved)

    class Boom:
        def __reduce__(self):
            return pytest.fail, ("a pickle was executed",)

    (saved / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Boom()}, protocol=2))
    with pytest.raises(UserError, match="never loaded"):
        load_detector(saved)
    (saved / "config.json").write_text("{ nonsense")
    with pytest.raises(UserError, match=r"config\.json"):
        load_detector(saved)


WORDS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"{}", 2**63),
        (b"{}", 10**10),
        (b"{}", 90_000_000),
        (b"", None),
        (b"[" * 100_000, None),
        (b'{"\xff": 1}', None),
        ({"a": WORDS | {"shape": [2**40, 2**20]}}, None),
        ({"a": WORDS | {"shape": [-2]}}, None),
        ({"a": WORDS | {"dtype": "OBJECT"}}, None),
        ({"a": WORDS | {"data_offsets": [0, 2**40]}}, None),
        ({"a": WORDS, "b": WORDS}, None),
    ],
)
@pytest.mark.promise("no-code")
def test_headers_that_lie_are_refused(saved, header, length):
    """Before memory is taken for what they announce, as weights alone and as a detector's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(8))
    for load, place in ((read_checkpoint, file), (load_detector, saved), (Detector.load, saved)):
        with pytest.raises(UserError, match="safetensors"):
            load(place)


@pytest.mark.promise("no-code")
def test_code_in_a_directory_is_never_run(saved, tmp_path, monkeypatch):
    """Transformers would ask on the terminal whether to run it; nobody is asked."""
    monkeypatch.setattr("builtins.input", lambda *question: pytest.fail("asked whether to run code"))
    (saved / "code.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    named = {"AutoConfig": "code.C", "AutoModelForObjectDetection": "code.M"}
    (saved / "config.json").write_text(json.dumps({"model_type": "unknown", "auto_map": named}))
    for load in (load_detector, Detector.load):
        with pytest.raises(UserError, match=r"config\.json|cannot be loaded"):
            load(saved)
    assert not (tmp_path / "owned").exists()


def test_weights_of_another_detector_are_refused(saved):
    other = tiny_detector("detr", classes=2)  # with "no object" its class head is of the same size
    other.save(saved.parent / "other")
    (saved / "model.safetensors").write_bytes((saved.parent / "other" / "model.safetensors").read_bytes())
    with pytest.warns(UserWarning, match="tensors were not in the file"):
        report = load_detector(saved).load_report
    assert any("ref_point_head" in name for name in report.missing)
    (saved / "config.json").write_text((saved / "config.json").read_text().replace('"d_model": 32', '"d_model": 64'))
    for names in (None, ["x"]):
        with pytest.raises(UserError, match=r"another shape than the detector's sizes say"):
            load_detector(saved, names)


def test_configuration_can_be_overridden_on_load(saved):
    assert load_detector(saved, dropout=0.3).config.dropout == 0.3
    with pytest.raises(UserError, match="no option 'dropuot'"):
        load_detector(saved, dropuot=0.3)


def test_unknown_families_and_sizes():
    with pytest.raises(UserError, match="did you mean 'conditional-detr'"):
        build_detector("condtional-detr", tiny_backbone())
    with pytest.raises(UserError, match="multiple of 2 x heads"):
        build_detector("detr", tiny_backbone(), hidden_size=30, heads=4)
    with pytest.raises(UserError, match="two-stage"):
        build_detector("deformable-detr", tiny_backbone(), two_stage=True)
    with pytest.raises(UserError, match="no option 'ffn'"):
        build_detector("detr", tiny_backbone(), ffn=3)


def test_a_seed_makes_a_detector_reproducible_without_touching_the_global_stream():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = (build_detector("detr", tiny_backbone(), seed=s, num_queries=4) for s in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(
        first.model.model.query_position_embeddings.weight, other.model.model.query_position_embeddings.weight
    )
