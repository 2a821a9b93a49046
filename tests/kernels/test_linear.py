"""Linear layers by oneDNN compute what PyTorch's do, and leave no trace in what is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from siamese_detr.kernels import linear
from siamese_detr.kernels.linear import Linear, install, product
from tiny_detectors import same_with_stock_layers

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this PyTorch has no oneDNN",
)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """For products of any size, on any processor."""
    monkeypatch.setattr(linear, "SMALLEST", 0)
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)


def layers(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A stock layer, and ours with its weights."""
    torch.manual_seed(0)
    stock = nn.Linear(inputs, outputs, bias)
    ours = copy.deepcopy(stock)
    install(ours)
    assert type(ours) is Linear
    return stock, ours


def outputs_and_gradients(layer: nn.Linear, x: Tensor, lay: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = layer(lay(x))
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], above)]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "one image for all": lambda x: x[:1].expand(3, -1, -1),
    "a vector": lambda x: x[0, 0],
    "without images": lambda x: x[0],
    "every other token": lambda x: x[:, ::2],
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([*LAYOUTS]),
)
def test_values_and_gradients_are_the_stock_ones(
    images: int, tokens: int, inputs: int, outputs: int, bias: bool, layout: str
) -> None:
    stock, ours = layers(inputs, outputs, bias)
    x = torch.randn(images, tokens, inputs)
    for got, want in zip(
        outputs_and_gradients(ours, x, LAYOUTS[layout]), outputs_and_gradients(stock, x, LAYOUTS[layout]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_large_products_are_as_exact_as_the_stock_ones() -> None:
    stock, ours = layers(256, 1024)
    x = torch.randn(1500, 256)
    exact = outputs_and_gradients(copy.deepcopy(stock).double(), x.double(), LAYOUTS["dense"])
    for got, other, want in zip(
        outputs_and_gradients(ours, x, LAYOUTS["dense"]),
        outputs_and_gradients(stock, x, LAYOUTS["dense"]),
        exact,
        strict=True,
    ):
        assert (got - want).norm() <= 2 * (other - want).norm() + 1e-6 * want.norm()


def test_gradients_only_where_wanted() -> None:
    _, ours = layers(6, 4)
    ours.weight.requires_grad_(False)
    ours(torch.randn(5, 6)).sum().backward()
    assert ours.weight.grad is None
    assert torch.equal(ours.bias.grad, torch.full((4,), 5.0))


def test_evaluation_half_precision_and_double_are_the_stock_ones() -> None:
    stock, ours = layers(6, 4)
    x = torch.randn(5, 6)
    assert torch.equal(ours.eval()(x), stock(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours.train()(x), stock(x))
    assert torch.equal(ours.double()(x.double()), stock.double()(x.double()))
    assert product(x[:0], torch.randn(4, 6)).shape == (0, 4)


def test_a_detector_is_what_it_was() -> None:
    same_with_stock_layers("detr", linear, Linear)
