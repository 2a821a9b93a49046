"""What only a CUDA device can show: there the same comes out, and the host hardly waits for it."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

import siamese_detr
from conftest import slow
from pretext_cases import random_features, randomise, small_detector
from runs import TINY, logged
from siamese_detr.detection.matching import assign
from siamese_detr.detectors import build_detector
from siamese_detr.detectors.functional import backbone_maps
from siamese_detr.errors import UserError
from siamese_detr.kernels import accelerate
from siamese_detr.kernels.frozen import FrozenBackbone, is_norm
from siamese_detr.kernels.fused import CudnnConv2d
from siamese_detr.pretext import build_pretext
from siamese_detr.training.pretrain import PretrainConfig, pretrain
from siamese_detr.views.batch import prepare
from siamese_detr.views.two_views import TwoViewDataset, collate
from tiny_detectors import gradients_in_half_precision_are_numbers
from tiny_finetuning import QUICK, write_scenes
from tiny_finetuning import TINY as SMALL_DETECTOR
from view_cases import SMALL, photo_store

OWN = {"proposal_method": "random"}
VARIED: dict[str, Any] = {"view_size": None, "short_sides": [64, 96, 128], "max_size": 160}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def _kernels_are_registered() -> None:
    pytest.importorskip("triton", reason="this system has no Triton")
    accelerate(torch.nn.Identity(), "cuda")


@pytest.mark.parametrize("method", ["siamese", "detreg"])
@pytest.mark.parametrize("family", ["conditional-detr", "detr", "deformable-detr", "dab-detr", "rt-detr"])
def test_losses_and_gradients_are_those_of_a_cpu(family: str, method: str) -> None:
    here = randomise(build_pretext(method, small_detector(family)))  # else points lie where gradients are not unique
    features = random_features(views=2 if method == "siamese" else 1, detector=here.detector)
    there, moved = copy.deepcopy(here).cuda(), features.to("cuda")
    accelerate(there, "cuda")
    expected, found = here(features), there(moved)
    expected.loss.backward()
    found.loss.backward()
    assert found.terms.keys() == expected.terms.keys()
    for name, value in expected.terms.items():
        assert_close(found.terms[name].cpu(), value, rtol=1e-5, atol=1e-6)
    for (name, one), other in zip(here.named_parameters(), there.named_parameters(), strict=True):
        if one.grad is not None:
            assert (other[1].grad.cpu() - one.grad).norm() <= 1e-3 * one.grad.norm() + 1e-5, name


@pytest.mark.parametrize(("targets", "queries"), [(1, 1), (10, 100), (10, 300), (70, 300), (5, 900), (130, 130)])
def test_the_assignment_is_scipys(targets: int, queries: int) -> None:
    cost = torch.randn(3, 2, 4, targets, queries, device="cuda")
    valid = torch.rand(2, 4, targets, device="cuda") < 0.8
    found = assign(cost, valid).cpu().numpy()
    for place in np.ndindex(3, 2, 4):
        rows = np.flatnonzero(valid[place[1:]].cpu())
        expected = np.zeros(targets, np.int64)
        expected[rows] = linear_sum_assignment(cost[place].cpu()[rows])[1]
        assert (found[place] == expected).all()


def test_costs_without_meaning_end_nothing() -> None:
    cost = torch.full((2, 1, 6, 9), float("nan"), device="cuda")
    cost[1] = float("inf")
    assert all(len(set(row.tolist())) == 6 for row in assign(cost).flatten(0, 1))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:.*random")
def test_the_frozen_backbone_is_fused(precision: torch.dtype) -> None:
    network = build_detector("conditional-detr", "random:resnet50", hidden_size=32, decoder_layers=2).backbone.cuda()
    with torch.no_grad():
        for value in network.parameters():
            if not value.any():  # the norms' weights at the ends of branches, too, which would add nothing
                value.fill_(0.1)
        images = torch.randn(3, 3, 128, 160, device="cuda")
        expected = backbone_maps(network, images)
        fast = FrozenBackbone(network)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            found = fast(images)
    kinds = [type(module) for module in fast.network(precision).modules()]
    assert kinds.count(CudnnConv2d) == 49  # all of 53 but the shortcuts
    for got, want in zip(found, expected, strict=True):
        assert (got - want).abs().max() <= (1e-4 if precision == torch.float32 else 0.05) * want.abs().max()


@pytest.mark.filterwarnings("ignore:.*random")
def test_a_backbone_in_which_rounding_adds_up_is_fused() -> None:
    network = build_detector("conditional-detr", "random:resnet50", hidden_size=32, decoder_layers=2).backbone.cuda()

    def settle(norm: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.masked_fill_(norm.weight == 0, 1)

    for module in filter(is_norm, network.modules()):
        module.register_forward_pre_hook(settle)
    images = torch.randn(2, 3, 128, 160, device="cuda")
    with torch.no_grad():
        expected = backbone_maps(network, images)[-1]
    for module in network.modules():
        module._forward_pre_hooks.clear()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        rounded = backbone_maps(network, images)[-1]
    assert (rounded - expected).abs().max() > 0.1 * expected.abs().max()
    kinds = [type(module) for module in FrozenBackbone(network).network(torch.bfloat16).modules()]
    assert kinds.count(CudnnConv2d) == 49


def test_augmentation_is_that_of_a_cpu(photos: Path) -> None:
    dataset = TwoViewDataset(photo_store(photos), SMALL, 0)
    batch = collate([dataset[0, n] for n in range(6)])
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    here, there = prepare(batch, mean, std, 64), prepare(moved, mean, std, 64)
    assert_close(there.pixel_values.cpu(), here.pixel_values, rtol=0, atol=1e-4)
    assert here.crops is not None
    assert there.crops is not None
    assert (there.crops.cpu() - here.crops).abs().mean() < 0.06


@pytest.mark.parametrize("case", ["deformable-detr", "rt-detr", "lw-detr"])
def test_gradients_in_half_precision_are_numbers_in_spite_of_padding(case: str) -> None:
    gradients_in_half_precision_are_numbers(case, "cuda", torch.float16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_waits_for_the_device_once(photos: Path, tmp_path: Path, precision: str) -> None:
    few, many = (waits(photos, tmp_path / str(steps), steps, precision) for steps in (6, 14))
    more = many - few
    assert 0 < more.total() <= 8, more  # none at all: PyTorch did not tell


def waits(photos: Path, out: Path, steps: int, precision: str) -> Counter[str]:
    """Where the host waited for the device in a run: PyTorch warns of it, but where an event is waited for."""
    stock, events = torch.cuda.Event.synchronize, Counter[str]()

    def counted(event: torch.cuda.Event) -> None:
        events["event"] += 1
        stock(event)

    options = (
        TINY | OWN | {"device": "auto", "precision": precision, "steps": steps, "save_every": 100, "log_every": 100}
    )
    with warnings.catch_warnings(record=True) as record, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda.Event, "synchronize", counted)
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            pretrain(PretrainConfig(images=str(photos), out=str(out), **options))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = (w for w in record if "synchronizing CUDA operation" in str(w.message))
    return events + Counter(f"{w.filename}:{w.lineno}" for w in found)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"precision": "bf16", "method": "up-detr"},
        {"method": "detreg", "accumulate": 2},
        {"precision": "bf16", "feature_bank": 1},
        {"detector": "deformable-detr", "precision": "bf16", "hidden_size": 32} | VARIED,
        {"workers": 2, "checkpoint_activations": True},
    ],
    ids=str,
)
def test_every_way_of_pre_training_runs(photos: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options = TINY | OWN | {"images": str(photos), "out": str(tmp_path / "run"), "device": "auto"} | options
    pretrain(PretrainConfig(**options))
    losses = [record["loss"] for record in logged(tmp_path / "run")]
    assert len(losses) == 8
    assert np.isfinite(losses).all()


@slow
def test_compiling_changes_nothing(photos: Path, tmp_path: Path) -> None:
    options = TINY | OWN | VARIED | {"images": str(photos), "device": "auto"}
    options |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "steps": 4}
    pretrain(PretrainConfig(**options, out=str(tmp_path / "plain")))
    pretrain(PretrainConfig(**options, out=str(tmp_path / "compiled"), compile=True))
    for plain, compiled in zip(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), strict=True):
        for name in (name for name in plain if name.startswith("loss")):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-3), name


def test_a_continued_run_is_the_uninterrupted_one(photos: Path, tmp_path: Path) -> None:
    options = TINY | OWN | {"images": str(photos), "out": str(tmp_path / "run"), "device": "auto", "keep": 0}
    pretrain(PretrainConfig(**options))
    whole = logged(tmp_path / "run")
    assert len(whole) == 8
    for later in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{later}")
    pretrain(PretrainConfig(**options, resume=True))
    for got, expected in zip(logged(tmp_path / "run"), whole, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-3)  # sums on a GPU have no fixed order


def test_what_is_not_finite_ends_a_run(photos: Path, tmp_path: Path) -> None:
    options = TINY | OWN | {"images": str(photos), "out": str(tmp_path / "run"), "device": "auto", "lr": 1e30}
    with pytest.raises(UserError, match="not finite at step") as caught:
        pretrain(PretrainConfig(**options))
    replay = str(tmp_path / "run" / "nonfinite.json")
    assert replay in str(caught.value)
    found = pretrain(PretrainConfig(**options, replay=replay))
    assert found.replay is not None
    assert "not finite" in found.replay


def test_fine_tune_evaluate_and_predict(tmp_path: Path) -> None:
    labels = str(write_scenes(tmp_path / "scenes"))
    options = SMALL_DETECTOR | QUICK | {"device": "auto"}
    siamese_detr.finetune(train=labels, val=labels, out=str(tmp_path / "run"), steps=60, eval_every=60, **options)
    model = str(tmp_path / "run" / "best")
    found = {d: siamese_detr.evaluate(model=model, labels=labels, device=d, workers=0) for d in ("cpu", "cuda")}
    assert found["cpu"].ap50 > 0.2
    assert found["cuda"].ap50 == pytest.approx(found["cpu"].ap50, abs=0.02)
