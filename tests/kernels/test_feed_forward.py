"""Our feed-forward block computes what the stock one does, and keeps its hidden activations once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMLP

from siamese_detr.kernels import feed_forward as module
from siamese_detr.kernels import linear
from siamese_detr.kernels.dropout import LEVELS
from siamese_detr.kernels.feed_forward import feed_forward
from siamese_detr.training.nonfinite import watch


def stock_block(seed: int = 0, activation_dropout: float = 0.0, activation: str = "relu") -> Any:
    torch.manual_seed(seed)
    config = DeformableDetrConfig(activation_function=activation, activation_dropout=activation_dropout, dropout=0.0)
    return DeformableDetrMLP(config, 6, 11).double().train()


def outputs_and_gradients(function: Any, block: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x, *block.parameters()], above)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(0, 13), st.integers(1, 6), st.integers(0, 1000))
def test_values_and_gradients_are_the_stock_ones(images: int, tokens: int, rows: int, seed: int) -> None:
    block = stock_block(seed)
    x = torch.randn(images, tokens, 6, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", rows)
        ours = outputs_and_gradients(lambda x: feed_forward(block, x), block, x)
    for got, want in zip(ours, outputs_and_gradients(block, block, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_what_is_dropped_is_dropped_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 4)
    block, x = stock_block(activation_dropout=0.3), torch.randn(2, 5, 6, dtype=torch.float64)
    drawn, draw = [], module.draw_kept

    def remembered(shape: torch.Size, dropped: int) -> Tensor:
        assert dropped == round(0.3 * LEVELS)
        drawn.append(draw(shape, dropped))
        return drawn[-1]

    monkeypatch.setattr(module, "draw_kept", remembered)
    ours = outputs_and_gradients(lambda x: feed_forward(block, x), block, x)
    kept = torch.cat(drawn).view(2, 5, 11).double() * LEVELS / (LEVELS - round(0.3 * LEVELS))
    assert 0 < int((kept == 0).sum()) < kept.numel()

    def slowly(x: Tensor) -> Tensor:
        return block.fc2(block.fc1(x).relu() * kept)

    for got, want in zip(ours, outputs_and_gradients(slowly, block, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_hidden_activations_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 64)
    block, x = stock_block(activation_dropout=0.3), torch.randn(1, 500, 6, dtype=torch.float64)

    def kept(function: Any) -> int:
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(x.clone().requires_grad_()).sum()
        return sum(found.values())

    hidden = 500 * 11 * x.element_size() + module.ROOM
    weights = sum(weight.nbytes for weight in block.parameters())
    assert kept(block) > 2 * hidden
    assert kept(lambda x: feed_forward(block, x)) <= hidden + x.nbytes + weights


def test_half_precision_is_as_exact_as_the_stock_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 8)  # 500 parts, which summed in half precision would lose most digits
    block, x = stock_block().float(), torch.randn(1, 4000, 6)
    exact = outputs_and_gradients(block, block, x)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outputs_and_gradients(lambda x: feed_forward(block, x), block, x)
        theirs = outputs_and_gradients(block, block, x)
    for got, other, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == other.dtype
        assert (got.float() - want).norm() <= 1.5 * (other.float() - want).norm()


def test_what_is_no_number_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "prefers_onednn", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise"))
    block, x = stock_block(activation_dropout=0.3).float(), torch.randn(2, 5, 6)
    with torch.no_grad():
        block.fc1.weight[3, 2] = float("nan")
    assert feed_forward(block, x).isnan().all()


def test_other_activations_keep_their_gradients() -> None:
    block, x = stock_block(activation="prelu"), torch.randn(2, 5, 6, dtype=torch.float64)
    ours = outputs_and_gradients(lambda x: feed_forward(block, x), block, x)
    for got, want in zip(ours, outputs_and_gradients(block, block, x), strict=True):
        torch.testing.assert_close(got, want)


def test_evaluation_is_the_stock_one() -> None:
    block, x = stock_block(activation_dropout=0.3).eval(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(feed_forward(block, x), block(x))


def test_a_block_that_makes_what_is_no_number_is_named() -> None:
    block = stock_block()
    with torch.no_grad():
        block.fc2.weight[3, 2] = float("nan")
    with watch(block) as found:
        feed_forward(block, torch.randn(2, 5, 6, dtype=torch.float64))
    assert found == ["the whole model (DeformableDetrMLP, from finite inputs)"]
