"""Layer norms that keep what they give compute what PyTorch's do, and detectors in training keep less."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from siamese_detr.detectors.layers import encoder_layer
from siamese_detr.kernels import layer_norm
from siamese_detr.kernels.layer_norm import SMALLEST, LayerNorm
from tiny_detectors import WIDTH, same_with_stock_layers, tiny_detector


def norms(width: int, seed: int = 0, **options: bool) -> tuple[nn.LayerNorm, nn.LayerNorm]:
    """A stock norm with weights of both signs, and ours with the same."""
    random = torch.Generator().manual_seed(seed)
    stock = nn.LayerNorm(width, **options)
    for parameter in stock.parameters():
        parameter.data = torch.randn(width, generator=random)
        parameter.data += parameter.data.sign() * 0.01
    ours = copy.deepcopy(stock)
    layer_norm.install(ours)
    assert type(ours) is LayerNorm
    return stock, ours


def outputs_and_gradients(norm: nn.LayerNorm, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    above = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return [out, *torch.autograd.grad(out, [x, *norm.parameters()], above)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(2, 40), st.integers(0, 99))
def test_values_and_gradients_are_the_stock_ones(images: int, tokens: int, width: int, seed: int) -> None:
    stock, ours = (norm.double() for norm in norms(width, seed))
    x = 3 + torch.randn(images, tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for got, want in zip(outputs_and_gradients(ours, x), outputs_and_gradients(stock, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("smallest", [1.0, 0.1, 1.01 * SMALLEST])
def test_single_precision_is_as_exact_as_needed(smallest: float) -> None:
    stock, ours = norms(256)
    for norm in (stock, ours):
        norm.weight.data = norm.weight.data.sign() * norm.weight.data.abs().clamp(min=smallest)
    x = torch.randn(500, 256)
    assert outputs_and_gradients(ours, x)[0].grad_fn.name() == "_LayerNormBackward"
    exact = outputs_and_gradients(copy.deepcopy(stock).double(), x.double())
    for got, want in zip(outputs_and_gradients(ours, x), exact, strict=True):
        assert (got - want).norm() <= (2e-6 + 1e-7 / smallest) * want.norm()


CHANGES = ("weights near zero", "large biases", "no bias", "no weights", "half precision", "autocast", "evaluation")


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_reversed_is_left_to_pytorch(change: str) -> None:
    options = {"no bias": {"bias": False}, "no weights": {"elementwise_affine": False}}.get(change, {})
    stock, ours = norms(4, **options)
    x = torch.randn(3, 4, dtype=torch.bfloat16 if change == "half precision" else torch.float32)
    for norm in (stock, ours):
        norm.to(x.dtype).train(change != "evaluation")
        if change == "weights near zero":
            norm.weight.data[1] = 1e-4
        elif change == "large biases":
            norm.bias.data[1] = -1e5
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        found, expected = outputs_and_gradients(ours, x), outputs_and_gradients(stock, x)
    assert found[0].grad_fn is not None
    assert found[0].grad_fn.name() == "NativeLayerNormBackward0"
    for got, want in zip(found, expected, strict=True):
        assert torch.equal(got, want)


def test_norms_over_several_dimensions_are_the_stock_ones() -> None:
    stock = nn.LayerNorm((3, 4))
    ours = copy.deepcopy(stock)
    layer_norm.install(ours)
    x = torch.randn(2, 3, 4)
    for got, want in zip(outputs_and_gradients(ours, x), outputs_and_gradients(stock, x), strict=True):
        assert torch.equal(got, want)


def test_compiled_it_is_pytorchs() -> None:
    _, ours = norms(4)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch.compile(ours, fullgraph=True, backend=backend)(torch.randn(3, 4)).sum().backward()
    assert graphs == [[nn.functional.layer_norm]]


def test_gradients_only_where_wanted() -> None:
    _, ours = norms(6)
    ours.weight.requires_grad_(False)
    ours(torch.randn(5, 6)).sum().backward()
    assert ours.weight.grad is None
    assert torch.equal(ours.bias.grad, torch.full((6,), 5.0))


def kept_bytes(layers: nn.ModuleList, tokens: Tensor, positions: Tensor) -> int:
    """Bytes of what layers keep for their backward pass."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        for layer in layers:
            tokens = encoder_layer(layer, tokens, attention_mask=None, position_embeddings=positions)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_layers_keep_no_sums() -> None:
    layers = tiny_detector("detr", dropout=0.1).train().model.model.encoder.layers
    tokens, positions = torch.randn(2, 50, WIDTH, requires_grad=True), torch.randn(2, 50, WIDTH)
    ours = kept_bytes(layers, tokens, positions)
    layer_norm.uninstall(layers)
    # Two in each of two layers; but what the last norm gives is kept by nothing else here.
    assert kept_bytes(layers, tokens, positions) - ours >= 3 * tokens.nbytes


def test_a_detector_is_what_it_was() -> None:
    same_with_stock_layers("conditional-detr", layer_norm, LayerNorm)
