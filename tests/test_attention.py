"""Attention and dropout for CPUs: PyTorch's function, its distribution, and no trace in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from siamese_detr.detectors import attention
from siamese_detr.detectors.attention import dropout
from tiny_detectors import region_queries, tiny_batch, tiny_detector


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


def test_dropout_drops_the_same_gradients_and_follows_the_seed() -> None:
    x = torch.randn(30, 7, requires_grad=True)
    torch.manual_seed(3)
    out = dropout(x, 0.3, True)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient * x, out)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.3, True), out)
    assert not torch.equal(dropout(x, 0.3, True), out)


def test_dropout_is_the_stock_one_where_nothing_is_drawn() -> None:
    x = torch.randn(5, 6)
    assert torch.equal(dropout(x, 0.5, False), x)
    assert torch.equal(dropout(x, 0.0, True), x)
    assert not dropout(x, 1.0, True).any()
    assert dropout(x[:0], 0.5, True).shape == (0, 6)


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_is_pytorchs(boolean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_dropout", lambda weights, probability, training: weights)
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=random, dtype=torch.float64) for n in (5, 7))
    value = torch.randn(2, 3, 7, 4, generator=random, dtype=torch.float64)
    may = torch.rand(2, 1, 1, 7, generator=random) > 0.4
    may[..., 0] = True
    mask = may if boolean else torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -1e300)
    ours, _ = attention.attention(nn.Module(), query, key, value, mask, dropout=0.1, scaling=0.3)
    stock, _ = attention.attention(nn.Module(), query, key, value, mask, dropout=0.0, scaling=0.3)
    torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("case", ["detr", "conditional-detr", "deformable-detr"])
def test_detectors_train_with_it(case: str, tmp_path: Path) -> None:
    detector = tiny_detector(case, dropout=0.1).train()
    assert detector.config._attn_implementation == attention.NAME
    images, mask = tiny_batch()
    drawn = []
    for _ in range(2):
        memory = detector.encode(detector.features(images, mask), mask)
        states = detector.decode(memory, region_queries()).states
        assert states.isfinite().all()
        drawn.append(states)
    assert not torch.equal(*drawn)
    drawn[0].sum().backward()
    detector.save(tmp_path)
    assert f'"{attention.NAME}"' not in (tmp_path / "config.json").read_text()
