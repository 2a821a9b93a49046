"""Checkpoints of the research codes, out and in again."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import timm
import torch

from siamese_detr.errors import UserError
from siamese_detr.interchange import load_research_checkpoint, research_state_dict, save_research_checkpoint
from siamese_detr.interchange.names import resnet_name
from siamese_detr.interchange.research import normalise
from tiny_detectors import tiny_detector

NAMES = json.loads((Path(__file__).parents[1] / "data" / "research_names.json").read_text())
CASES = {
    "conditional-detr": ("conditional-detr", {}),
    "detr": ("detr", {}),
    "deformable-detr": ("deformable-detr", {}),
    "deformable-detr-one-scale": ("deformable-detr", {}),
}
every_case = pytest.mark.parametrize("case", [*CASES, "deformable-detr-refined"])


def shaken(case, seed):
    """A detector whose every tensor is random."""
    detector = tiny_detector(case)
    random = torch.Generator().manual_seed(seed)
    for value in detector.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=random) + 0.1)
    return detector


def transferable(detector):
    heads = {parameter.data_ptr() for parameter in detector.class_heads.parameters()}
    return {
        name: value
        for name, value in detector.state_dict().items()
        if value.data_ptr() not in heads and "num_batches_tracked" not in name
    }


@every_case
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_out_and_in_again_is_exact(case, suffix, tmp_path):
    source, target = shaken(case, 1), shaken(case, 2)
    save_research_checkpoint(source, tmp_path / f"model{suffix}")
    report = load_research_checkpoint(tmp_path / f"model{suffix}", target)
    assert report.missing == report.unused == ()
    after = transferable(target)
    for name, value in transferable(source).items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("case", NAMES)
def test_names_are_those_of_the_official_code(case):
    """The names, with layers numbered {i}, computed with the official Siamese DETR code ((c) 2023 SenseTime)."""
    detector = tiny_detector(case)
    layers = {"encoder": detector.config.encoder_layers, "decoder": detector.config.decoder_layers}
    official = set()
    for name in NAMES[case]:
        part = "encoder" if ".encoder." in name else "decoder"
        first_only = "ca_qpos_proj" in name
        official |= {name.replace("{i}", str(i)) for i in range(1 if first_only else layers[part])}
    # The test's backbone is smaller than theirs.
    ours = {name for name in research_state_dict(detector) if not name.startswith("backbone.")}
    assert set(normalise({name: torch.zeros(1, 1) for name in official})) == ours


def official_style(state, family):
    """As Siamese DETR's code stores it, distributed, with the pretext's own heads."""
    state = dict(state)
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


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_of_the_official_code_load(case, tmp_path):
    source, target = shaken(case, 1), shaken(case, 2)
    state = official_style(research_state_dict(source), CASES[case][0])
    torch.save({"state_dict": state, "step": 7, "args": argparse.Namespace(lr=1)}, tmp_path / "ckpt.pth.tar")
    report = load_research_checkpoint(tmp_path / "ckpt.pth.tar", target)
    assert report.missing == ()
    assert len(report.unused) == 3
    after = transferable(target)
    assert all(torch.equal(value, after[name]) for name, value in transferable(source).items())


def test_detectors_of_the_original_codes_load(tmp_path):
    """DETR's own spelling of its backbone; Deformable DETR's heads repeated per layer and inside the decoder."""
    source, target = shaken("detr", 1), shaken("detr", 2)
    state = {k.replace("backbone.", "backbone.0.body."): v for k, v in research_state_dict(source).items()}
    state |= {f"class_embed.{k}": v for k, v in source.class_heads[0].state_dict().items()}
    torch.save({"model": state, "optimizer": {}}, tmp_path / "detr.pth")
    report = load_research_checkpoint(tmp_path / "detr.pth", target, class_head=True)
    assert report.missing == report.unused == ()
    after = target.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in source.state_dict().items())

    source, target = shaken("deformable-detr-refined", 1), shaken("deformable-detr-refined", 2)
    state = research_state_dict(source)
    state |= {f"transformer.decoder.{k}": v for k, v in state.items() if k.startswith("bbox_embed")}
    torch.save({"model": state}, tmp_path / "deformable.pth")
    assert load_research_checkpoint(tmp_path / "deformable.pth", target).missing == ()


def test_the_backbone_may_be_left_alone(tmp_path):
    source, target = shaken("detr", 1), shaken("detr", 2)
    save_research_checkpoint(source, tmp_path / "detr.pth")
    before = {name: value.clone() for name, value in target.backbone.state_dict().items()}
    report = load_research_checkpoint(tmp_path / "detr.pth", target, backbone=False)
    assert report.missing == ()
    assert all(name.startswith("backbone.") for name in report.unused)
    assert all(torch.equal(value, before[name]) for name, value in target.backbone.state_dict().items())


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    """Neither the class head, which fits."""
    source, target = shaken("detr", 1), tiny_detector("detr", num_queries=7)
    state = research_state_dict(source)
    state |= {f"class_embed.{k}": v for k, v in source.class_heads[0].state_dict().items()}
    torch.save({"model": state}, tmp_path / "detr.pth")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match="other sizes"):
        load_research_checkpoint(tmp_path / "detr.pth", target, class_head=True)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_other_detectors_are_refused(tmp_path):
    save_research_checkpoint(shaken("detr", 1), tmp_path / "detr.pth")
    with pytest.raises(UserError, match=r"other sizes: .* build the detector with the checkpoint's sizes"):
        load_research_checkpoint(tmp_path / "detr.pth", tiny_detector("detr", num_queries=7))
    torch.save({"layer1.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="holds no detr Transformer"):
        load_research_checkpoint(tmp_path / "other.pth", tiny_detector("detr"))
    with pytest.raises(UserError, match="have no 'rt-detr'"):
        save_research_checkpoint(tiny_detector("rt-detr"), tmp_path / "x.pth")
    with pytest.raises(UserError, match="cannot write"):
        save_research_checkpoint(tiny_detector("detr"), tmp_path / "no" / "folder" / "x.pth")


def test_every_resnet_name_is_translated():
    from transformers import ResNetBackbone, ResNetConfig

    for network, config in (("resnet18", ("basic", [2, 2, 2, 2])), ("resnet50", ("bottleneck", [3, 4, 6, 3]))):
        with torch.device("meta"):
            theirs = timm.create_model(network).state_dict()
            sizes = [64, 128, 256, 512] if config[0] == "basic" else [256, 512, 1024, 2048]
            ours = ResNetBackbone(ResNetConfig(layer_type=config[0], depths=config[1], hidden_sizes=sizes)).state_dict()
        translated = {resnet_name(name): value.shape for name, value in theirs.items() if not name.startswith("fc.")}
        assert translated == {name: value.shape for name, value in ours.items()}
