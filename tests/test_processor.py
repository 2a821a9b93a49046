"""What is said of this machine's processor is what it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from siamese_detr import processor
from siamese_detr.processor import emulates_bf16, prefers_onednn
from siamese_detr.training.settings import RunSettings

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    prefers_onednn.cache_clear()
    yield
    prefers_onednn.cache_clear()


@needs_onednn
def test_bf16_is_emulated_where_onednn_cannot_compute_in_it() -> None:
    x, weight = torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(2, 8, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except RuntimeError:
        assert emulates_bf16("cpu")
    else:
        assert not emulates_bf16("cpu")


def test_without_a_gpu_nothing_is_said_of_it() -> None:
    assert torch.cuda.is_available() or not emulates_bf16("cuda")


@pytest.mark.parametrize(("maker", "preferred"), [("AuthenticAMD", True), ("GenuineIntel", False)])
@needs_onednn
def test_onednn_is_preferred_on_amd_processors_only(
    maker: str, preferred: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert prefers_onednn() == preferred


@pytest.mark.parametrize(("precision", "emulated"), [("bf16", True), ("bf16", False), ("fp32", True)])
def test_a_run_in_an_emulated_precision_says_that_it_is_slow(
    precision: str, emulated: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr("siamese_detr.training.settings.emulates_bf16", lambda device: emulated)
    settings = RunSettings(
        out=tmp_path, steps=1, batch_size=1, lr_factor=lambda step: 1.0, precision=precision, device="cpu"
    )
    settings.arguments()
    said = [str(warning.message) for warning in recwarn if "bf16" in str(warning.message)]
    assert len(said) == (precision == "bf16" and emulated)
    assert all("use precision fp32" in text for text in said)
