"""What is said of this machine's processors is what they do."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

import siamese_detr
from siamese_detr.errors import UserError
from siamese_detr.runtime.hardware import choose_device, emulates_bf16
from siamese_detr.runtime.processes import meet
from siamese_detr.training import checks

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
def test_bf16_is_emulated_where_onednn_cannot_compute_in_it() -> None:
    x, weight = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except RuntimeError:
        assert emulates_bf16("cpu")
    else:
        assert not emulates_bf16("cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_is_emulated_by_gpus_without_it(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not emulates_bf16("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or supported)
    assert emulates_bf16("cuda") != supported


@pytest.mark.parametrize(
    ("precision", "device", "main", "said"),
    [
        ("bf16", "cpu", True, "use precision fp32"),
        ("bf16", "cuda", True, "use precision fp16"),
        ("bf16", "cpu", False, None),
        ("fp32", "cpu", True, None),
    ],
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_run_in_an_emulated_precision_says_that_it_is_slow(
    precision: str, device: str, main: bool, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "emulates_bf16", lambda asked: asked == device)
    with pytest.warns(UserWarning, match=said) if said else contextlib.nullcontext():
        checks.check_precision(precision, torch.device(device), main)
    monkeypatch.setattr(checks, "emulates_bf16", lambda asked: False)
    checks.check_precision(precision, torch.device(device), main)


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps:3", "CPU", ""])
def test_a_device_that_is_not_there_is_refused_alike_in_every_verb(name: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for run in (
        lambda: siamese_detr.pretrain("photos", out, device=name),
        lambda: siamese_detr.finetune("train.json", out, device=name),
        lambda: choose_device(name),
    ):
        with pytest.raises(UserError, match=f"device {name!r} cannot be used .*; try 'auto' or 'cpu'"):
            run()


def test_one_device_is_no_device_for_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meet("cpu").device.type == "cpu"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="device cpu:0 is one device, and there are several processes: give cpu"):
        meet("cpu:0")
