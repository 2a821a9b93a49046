"""Convolutions with fewer multiplications are convolutions."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from siamese_detr.kernels import winograd
from siamese_detr.kernels.fused import FusedConv2d
from tiny_detectors import needs_onednn


@settings(deadline=None)  # the first call compiles
@given(
    batch=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    height=st.integers(1, 13),
    width=st.integers(1, 13),
    biased=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_convolution(
    batch: int, channels: tuple[int, int], height: int, width: int, biased: bool, relu: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels[0], height, width, generator=random, dtype=torch.float64)
    weight = torch.randn(*channels[::-1], 3, 3, generator=random, dtype=torch.float64)
    bias = torch.randn(channels[1], generator=random, dtype=torch.float64) if biased else None
    expected = conv2d(x, weight, bias, padding=1)
    found = winograd.convolve(x, winograd.transform_filters(weight), bias, relu=relu)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=0, atol=1e-10)


def test_rounding_stays_small() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 256, 24, 29, generator=random).relu()
    weight = torch.randn(256, 256, 3, 3, generator=random) / 48
    expected = conv2d(x.double(), weight.double(), padding=1)
    found = winograd.convolve(x, winograd.transform_filters(weight))
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_what_is_no_number_stays_so() -> None:
    x, weight = torch.ones(1, 2, 9, 9), torch.ones(3, 2, 3, 3)
    x[0, 1, 4, 5] = torch.nan
    found = winograd.convolve(x, winograd.transform_filters(weight), relu=True)
    assert found[conv2d(x, weight, padding=1).isnan()].isnan().all()
    assert found[0, :, 0, 0].isfinite().all()  # in another tile


@needs_onednn
def test_it_is_used_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    convolve = winograd.convolve
    monkeypatch.setattr(
        winograd, "convolve", lambda x, *rest, **options: used.append(x) or convolve(x, *rest, **options)
    )
    convolution = torch.nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False)
    fused = FusedConv2d(convolution, ("relu", []))
    for side, expected_uses in ((16, 1), (8, 1), (17, 2), (13, 2)):  # too few tiles of 8, too much border of 13
        x = torch.randn(2, 128, side, side).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fused(x), convolution(x).relu(), rtol=0, atol=1e-4)
        assert len(used) == expected_uses
    monkeypatch.setattr(winograd, "THREADS", 0)
    fused(torch.randn(2, 128, 16, 16).contiguous(memory_format=torch.channels_last))
    assert len(used) == 2
    fused.forget_shapes()
    assert torch.equal(fused.plain(), convolution.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"padding": 0},
        {"padding": (1, 0)},
        {"dilation": 2},
        {"groups": 2},
        {"dtype": torch.bfloat16},
        {"kernel_size": 1},
        {"out_channels": 64},
        {"in_channels": 1024},
    ],
)
def test_other_convolutions_stay_as_they_are(options: dict) -> None:
    plain = {"in_channels": 128, "out_channels": 128, "kernel_size": 3, "padding": 1}
    assert winograd.suits(torch.nn.Conv2d(**plain))
    assert not winograd.suits(torch.nn.Conv2d(**plain | options))


def test_numba_is_imported_where_it_computes_only() -> None:
    program = "import sys, siamese_detr.training.pretrain; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
