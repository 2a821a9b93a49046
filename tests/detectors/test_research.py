"""Checkpoints of the research codes, out and in again, and by path in every verb."""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from pathlib import Path

import pytest
import timm
import torch
from transformers import ResNetBackbone, ResNetConfig

from siamese_detr.detectors import build_detector, load_detector, save_research_checkpoint
from siamese_detr.detectors.research.checkpoint import normalise, research_state_dict
from siamese_detr.detectors.research.names import torchvision_name
from siamese_detr.errors import UserError
from siamese_detr.evaluation.evaluate import evaluate
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.predict import predict
from siamese_detr.interchange.export import export
from siamese_detr.training.finetune import finetune
from siamese_detr.training.pretrain import pretrain
from tiny_detectors import tiny_detector
from tiny_finetuning import QUICK, write_scenes

NAMES = json.loads((Path(__file__).parents[1] / "data" / "research_names.json").read_text())
CASES = {
    "conditional-detr": ("conditional-detr", {}),
    "detr": ("detr", {}),
    "dilated": ("detr", {"dilation": True}),
    "deformable-detr": ("deformable-detr", {}),
    "deformable-detr-one-scale": ("deformable-detr", {"num_feature_levels": 1}),
    "deformable-detr-refined": ("deformable-detr", {"with_box_refine": True}),
}
CLASSES = ["ant", "bee", "cow"]


@functools.cache
def detector(case, classes=3):
    """A small detector on a ResNet-18 that the research codes could have; to be left as it is."""
    family, options = CASES[case]
    sizes = dict(hidden_size=32, heads=4, encoder_layers=2, decoder_layers=3, ffn_size=40, num_queries=12)
    names = CLASSES if classes == 3 else [f"class {i}" for i in range(classes)]
    with warnings.catch_warnings(action="ignore"):
        return build_detector(family, "random:resnet18", class_names=names, seed=0, **sizes, **options)


def save(state, path, **beside):
    torch.save({"model": state, "args": argparse.Namespace(nheads=4, lr=1e-4, dilation=False), **beside}, path)
    return path


def same_tensors(one, other, *, but_heads=False):
    """Whether two detectors have the same tensors; perhaps save the class heads."""
    left, right = one.state_dict(), other.state_dict()
    heads = ("class_labels_classifier", "class_embed") if but_heads else ()
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left if not any(head in name for head in heads))


@pytest.mark.parametrize("case", CASES)
def test_out_and_in_again_is_exact(case, tmp_path):
    """Family, sizes and classes come from the file."""
    source = detector(case)
    save_research_checkpoint(source, tmp_path / "model.pth")
    loaded = load_detector(tmp_path / "model.pth")
    assert loaded.load_report.missing == loaded.load_report.unexpected == ()
    assert same_tensors(source, loaded)
    left, right = source.config.to_dict(), loaded.config.to_dict()
    changed = {name for name, value in left.items() if right[name] != value}
    assert changed <= {"dtype", "backbone_config", "_name_or_path"}
    assert source.config.backbone_config.output_stride == loaded.config.backbone_config.output_stride
    assert loaded.class_names == Detector.load(tmp_path / "model.pth", "cpu").class_names == CLASSES


def test_safetensors_say_no_number_of_heads(tmp_path):
    save_research_checkpoint(detector("deformable-detr"), tmp_path / "model.safetensors")
    loaded = load_detector(tmp_path / "model.safetensors")
    assert same_tensors(detector("deformable-detr"), loaded)
    assert (loaded.config.encoder_attention_heads, loaded.class_names[0]) == (8, "LABEL_0")


@pytest.mark.parametrize("case", NAMES)
def test_names_are_those_of_the_official_code(case):
    """The names, with layers numbered {i}, computed with the official Siamese DETR code ((c) 2023 SenseTime)."""
    tiny = tiny_detector(case)
    layers = {"encoder": tiny.config.encoder_layers, "decoder": tiny.config.decoder_layers}
    official = set()
    for name in NAMES[case]:
        part = "encoder" if ".encoder." in name else "decoder"
        first_only = "ca_qpos_proj" in name
        official |= {name.replace("{i}", str(i)) for i in range(1 if first_only else layers[part])}
    # The test's backbone is smaller than theirs; their class head is the pretext's.
    ours = {name for name in research_state_dict(tiny) if not name.startswith(("backbone.", "class_embed."))}
    assert set(normalise({name: torch.zeros(1, 1) for name in official})) == ours


def siamese(state, family):
    """As Siamese DETR's code stores it, distributed, with the pretext's own heads."""
    if family == "deformable-detr":
        query = state.pop("query_embed.weight")
        state["query_embed.weight"], state["transformer.tgt_embed.weight"] = query.chunk(2, 1)
        state = {name.replace("bbox_embed.0.", "bbox_embed."): value for name, value in state.items()}
    state = {name.replace("bbox_embed.", "pred_head.bbox_embed."): value for name, value in state.items()}
    state |= {
        "pred_head.class_embed.weight": torch.zeros(3, 32),
        "patch2query.weight": torch.zeros(32, 16),
        "enc_head.0.projector.mlp.0.weight": torch.zeros(32, 32),
    }
    return {f"module.{name}": value for name, value in state.items()}


def up_detr(state, family):
    return {
        **state,
        "class_embed.weight": torch.zeros(3, 32),
        "class_embed.bias": torch.zeros(3),
        "patch2query.weight": torch.zeros(32, 512),
        "feature_align.layers.0.weight": torch.zeros(32, 32),
    }


def detreg(state, family):
    return state | {
        "class_embed.0.weight": torch.zeros(2, 32),
        "class_embed.0.bias": torch.zeros(2),
        "feature_embed.layers.0.weight": torch.zeros(32, 32),
    }


PRETRAINED = [
    *((siamese, case) for case in CASES if case not in ("dilated", "deformable-detr-refined")),
    *((up_detr, "detr"), (detreg, "deformable-detr"), (detreg, "deformable-detr-refined")),
]


@pytest.mark.parametrize(("code", "case"), PRETRAINED)
def test_pretrained_detectors_have_no_classes_yet(code, case, tmp_path):
    source = detector(case)
    state = {name: value for name, value in research_state_dict(source).items() if "class_embed" not in name}
    path = save(code(state, CASES[case][0]), tmp_path / "pretrained.pth")
    with pytest.warns(UserWarning, match=r"tensors have no place in a .* and are left out, e.g."):
        loaded = load_detector(path, CLASSES)
    assert loaded.load_report.missing == ()
    assert len(loaded.load_report.unexpected) >= 3
    assert loaded.load_report.remade
    assert loaded.class_names == CLASSES
    assert same_tensors(source, loaded, but_heads=True)
    with pytest.raises(UserError, match="only been pre-trained and has no classes yet"):
        evaluate(model=str(path), labels="any.json", device="cpu")


def test_detectors_of_the_original_codes_load(tmp_path):
    """DETR's own spelling of its backbone; Deformable DETR's heads repeated per layer and inside the decoder."""
    source = detector("detr", 91)
    state = {k.replace("backbone.", "backbone.0.body."): v for k, v in research_state_dict(source).items()}
    loaded = load_detector(save(state, tmp_path / "detr.pth", optimizer={}, epoch=3))
    assert same_tensors(source, loaded)
    assert (loaded.class_names[1], loaded.class_names[90]) == ("person", "toothbrush")

    source = detector("deformable-detr-refined", 91)
    state = research_state_dict(source)
    state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed")}
    assert same_tensors(source, load_detector(save(state, tmp_path / "refined.pth")))

    source = detector("deformable-detr", 91)
    state = research_state_dict(source)
    heads = [name for name in state if "_embed.0." in name]
    state |= {name.replace("_embed.0.", f"_embed.{i}."): state[name] for name in heads for i in (1, 2)}
    loaded = load_detector(save(state, tmp_path / "deformable.pth"))
    assert loaded.load_report.unexpected == ()
    assert same_tensors(source, loaded)
    assert not loaded.config.with_box_refine


def test_every_verb_takes_one(tmp_path, capsys):
    labels = write_scenes(tmp_path / "scenes", 4)
    model = str(tmp_path / "detr.pth")
    save_research_checkpoint(detector("conditional-detr"), model)
    quick = {"device": "cpu", "workers": 0}
    assert predict(model=model, images=str(tmp_path / "scenes" / "0.jpg"), out=str(tmp_path / "found"), **quick).results
    assert export(model=model, out=str(tmp_path / "copy")).difference == 0
    assert finetune(train=str(labels), out=str(tmp_path / "tuned"), model=model, steps=1, **QUICK)
    assert "detr.pth: 255 tensors kept; 2 re-made" in capsys.readouterr().err
    sizes = {"view_size": 48, "crop_size": 32, "num_regions": 3, "batch_size": 2, "proposal_method": "random"}
    options = sizes | quick | {"progress": False, "steps": 1, "init": model}
    assert pretrain(images=str(tmp_path / "scenes"), out=str(tmp_path / "run"), **options).steps == 1


class Surprise:
    """No tensor."""


def test_what_is_no_detector_is_said_in_one_line(tmp_path):
    state = research_state_dict(detector("deformable-detr"))
    plain = research_state_dict(detector("detr"))
    backbone = {name.removeprefix("backbone."): v for name, v in plain.items() if name.startswith("backbone.")}
    two_stage = {**state, "transformer.enc_output.weight": torch.zeros(2)}
    del two_stage["query_embed.weight"]
    cases = {
        "a backbone, no detector; give it as --backbone": backbone,
        "a backbone, no detector": {f"module.encoder_q.{name}": value for name, value in backbone.items()},
        "a two-stage Deformable DETR": two_stage,
        "a DAB-DETR or one of its descendants": {**plain, "refpoint_embed.weight": torch.zeros(2)},
        "normalises before attention": {**plain, "transformer.encoder.norm.weight": torch.zeros(2)},
        "learned position embeddings": {**plain, "backbone.1.row_embed.weight": torch.zeros(2)},
        "no ResNet of 18, 26": {name: value for name, value in plain.items() if not name.startswith("backbone.")},
        "no detector of a known code; its tensors are called layer.weight": {"layer.weight": torch.zeros(2)},
        "another shape than the detector's sizes say": {**plain, "query_embed.weight": torch.zeros(12, 16)},
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message) as error:
            load_detector(save(tensors, tmp_path / "x.pth"))
        assert "x.pth" in str(error.value)
        assert "\n" not in str(error.value)
    torch.save({"model": plain, "code": Surprise()}, tmp_path / "code.pth")
    with pytest.raises(UserError, match=r"code\.pth .*holds Python objects besides tensors, which are never loaded"):
        load_detector(tmp_path / "code.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("no checkpoint")
    for name in ("cut.pth", "text.pth"):
        with pytest.raises(UserError, match=f"{name} .*(damaged|cannot be read)"):
            load_detector(tmp_path / name)
    with pytest.raises(UserError, match=r"there is no detector models/none\.pth: no such file or folder"):
        load_detector("models/none.pth")
    detector("detr").save(tmp_path / "folder")
    with pytest.raises(UserError, match="is only one file of a detector; name the folder"):
        load_detector(tmp_path / "folder" / "model.safetensors")


def test_what_the_codes_do_not_have_is_not_written(tmp_path):
    with pytest.raises(UserError, match="have no 'rt-detr'"):
        save_research_checkpoint(tiny_detector("rt-detr"), tmp_path / "x.pth")
    with pytest.raises(UserError, match="cannot write"):
        save_research_checkpoint(tiny_detector("detr"), tmp_path / "no" / "folder" / "x.pth")


def test_resnets_of_transformers_are_written_under_torchvisions_names(tmp_path):
    for network, config in (("resnet18", ("basic", [2, 2, 2, 2])), ("resnet50", ("bottleneck", [3, 4, 6, 3]))):
        with torch.device("meta"):
            theirs = timm.create_model(network).state_dict()
            sizes = [64, 128, 256, 512] if config[0] == "basic" else [256, 512, 1024, 2048]
            ours = ResNetBackbone(ResNetConfig(layer_type=config[0], depths=config[1], hidden_sizes=sizes)).state_dict()
        translated = {torchvision_name(name): value.shape for name, value in ours.items()}
        assert translated == {name: value.shape for name, value in theirs.items() if not name.startswith("fc.")}
