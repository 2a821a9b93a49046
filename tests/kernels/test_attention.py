"""Attention for CPUs: PyTorch's function, and no trace in what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from siamese_detr.kernels import attention
from siamese_detr.kernels.dropout import LEVELS, draw_kept, scale
from tiny_detectors import region_queries, tiny_batch, tiny_detector


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_is_pytorchs(boolean: bool) -> None:
    random = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 8, generator=random, dtype=torch.float64) for n in (5, 7))
    value = torch.randn(2, 3, 7, 4, generator=random, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    may = torch.rand(2, 1, 1, 7, generator=random) > 0.4
    may[..., 0] = True
    mask = may if boolean else torch.zeros(may.shape, dtype=torch.float64).masked_fill(~may, -1e300)
    above = torch.randn(2, 5, 3, 4, generator=random, dtype=torch.float64)

    torch.manual_seed(1)
    ours, _ = attention.attention(nn.Module(), *inputs, mask, dropout=0.3, scaling=0.3)
    dropped = round(0.3 * LEVELS)
    torch.manual_seed(1)
    kept = draw_kept(torch.Size((2, 3, 5, 7)), dropped)
    # PyTorch's own weights: the identity as values gives them.
    weights = attention.sdpa_attention_forward(
        nn.Module(), query, key, torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7), mask, scaling=0.3
    )[0].transpose(1, 2)
    stock = (weights * kept * scale(dropped) @ value).transpose(1, 2)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, above), torch.autograd.grad(stock, inputs, above))


def test_autocast_is_followed() -> None:
    inputs = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention.attention(nn.Module(), *inputs, None, dropout=0.3)
    assert out.dtype == torch.bfloat16
    assert all(x.dtype == torch.float32 and x.any() for x in torch.autograd.grad(out.sum(), inputs))


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
