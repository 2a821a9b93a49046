"""Dropout for CPUs has PyTorch's distribution, for few and for many elements, and in every precision."""

from __future__ import annotations

import pytest
import torch

from siamese_detr.kernels import dropout as module
from siamese_detr.kernels.dropout import LEVELS, bits, draw_kept, dropout, mask, pack, residual, unpack


@pytest.fixture(params=["few", "many"], autouse=True)
def generator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of the sources of random bits."""
    monkeypatch.setattr(module, "MANY", 1 << 40 if request.param == "few" else 1)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_has_its_distribution(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(50, 4001)
    out = dropout(x, probability, True)
    kept = out != 0
    spread = (probability * (1 - probability) / x.numel()) ** 0.5
    assert abs(float((~kept).float().mean()) - probability) < 5 * spread
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - probability)), rtol=2e-4, atol=0)
    # Neighbours, which share a random number, are independent of each other.
    for distance in (1, 2, 3, 4):
        both = (~kept.flatten()[:-distance] & ~kept.flatten()[distance:]).float().mean()
        assert abs(float(both) - probability**2) < 6 * (probability**2 / x.numel()) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_drops_the_same_gradients_and_follows_the_seed(dtype: torch.dtype) -> None:
    x = torch.randn(30, 7).to(dtype).requires_grad_()
    torch.manual_seed(3)
    out = dropout(x, 0.3, True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient * x, out)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, True), out)
    assert not torch.equal(dropout(x, 0.3, True), out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_residual_adds_what_dropout_leaves(dtype: torch.dtype) -> None:
    x, branch = (torch.randn(30, 7).to(dtype).requires_grad_() for _ in range(2))
    torch.manual_seed(3)
    out = residual(x, branch, 0.3, True)
    torch.manual_seed(3)
    expected = x + dropout(branch, 0.3, True)
    torch.testing.assert_close(out, expected, rtol=0, atol=8 * torch.finfo(dtype).eps)  # rounded once less
    for got, want in zip(
        torch.autograd.grad(out.sum(), (x, branch)), torch.autograd.grad(expected.sum(), (x, branch)), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_mask_multiplies(dtype: torch.dtype) -> None:
    x = torch.randn(40, 9).to(dtype).t()  # of any strides
    kept = (torch.rand(9, 40) > 0.4).byte()
    expected = torch.where(kept.bool(), x, 0)
    for integers in (kept, kept.to(torch.int16)):
        before = integers.clone()
        assert torch.equal(mask(x, integers), expected)
        assert torch.equal(integers, before)
    bits(x).mul_(kept)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 16)])
def test_one_bit_is_kept_of_an_element(shape: tuple[int, ...]) -> None:
    kept = draw_kept(torch.Size(shape), LEVELS // 2)
    assert torch.equal(unpack(pack(kept), kept.shape), kept.to(torch.uint8))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        dropout(torch.randn(shape, requires_grad=True), 0.5, True)
    assert sizes == [-(-kept.numel() // 8)]


def test_dropout_is_the_stock_one_where_nothing_is_drawn() -> None:
    x = torch.randn(5, 6)
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert not dropout(x, 1.0, True).any()
    assert dropout(x[:0], 0.5, True).shape == (0, 6)
