"""The sampling of deformable attention: every implementation computes what Transformers' module does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sampling_cases import outputs_and_gradients, random_inputs, stock
from siamese_detr.kernels import cpu_sampling
from siamese_detr.kernels.sampling import deformable_sample

Shapes = list[tuple[int, int]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    "cpu": (cpu_sampling.sample, cpu_sampling.sample_backward),
}
try:
    from siamese_detr.kernels import gpu_sampling

    IMPLEMENTATIONS["cuda"] = (gpu_sampling.sample, gpu_sampling.sample_backward)
except ImportError:  # this system has no Triton
    pass
IMPLEMENTATION = pytest.mark.parametrize("name", IMPLEMENTATIONS)


def flat(shapes: Shapes) -> list[int]:
    return [side for shape in shapes for side in shape]


def sample(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """As a detector calls it."""
    return deformable_sample(value, locations, weights, flat(shapes))


def directly(name: str, inputs: tuple[Tensor, ...], shapes: Shapes, above: Tensor) -> list[Tensor]:
    """What an implementation gives, and the gradients of its inputs."""
    forward, backward = IMPLEMENTATIONS[name]
    place = DEVICE if name == "cuda" else "cpu"
    inputs = tuple(x.to(place) for x in inputs)
    outputs = forward(*inputs, flat(shapes)), *backward(above.to(place), *inputs, flat(shapes))
    return [x.cpu() for x in outputs]


@IMPLEMENTATION
@settings(max_examples=15, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    reach=st.sampled_from([0.5, 2.0, 100.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_values_and_gradients_are_the_stock_ones(
    name: str, shapes: Shapes, seed: int, reach: float, dtype: torch.dtype
) -> None:
    inputs = random_inputs(shapes, seed, dtype, reach)
    theirs = outputs_and_gradients(stock, inputs, shapes)
    above = torch.randn(theirs[0].shape, generator=torch.Generator().manual_seed(9)).to(theirs[0])
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4
    for output, expected in zip(directly(name, inputs, shapes, above), theirs, strict=True):
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance * (1 + reach))


@IMPLEMENTATION
def test_half_precision_is_computed_in_single(name: str) -> None:
    shapes = [(6, 8)]
    value, locations, weights = random_inputs(shapes, 0, torch.float32)
    above = torch.ones(2, 7, 8)
    half, *_ = directly(name, (value.bfloat16(), locations, weights), shapes, above.bfloat16())
    full, *_ = directly(name, (value.bfloat16().float(), locations, weights), shapes, above)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, full.bfloat16())


@IMPLEMENTATION
@pytest.mark.parametrize(("batch", "queries"), [(0, 7), (2, 0)])
def test_nothing_to_sample(name: str, batch: int, queries: int) -> None:
    value, locations, weights = random_inputs([(6, 8)], 0)
    inputs = (value[:batch], locations[:batch, :queries], weights[:batch, :queries])
    output, *gradients = directly(name, inputs, [(6, 8)], torch.zeros(batch, queries, 8, dtype=torch.float64))
    assert output.shape == (batch, queries, 8)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("wrong", ["maps", "levels", "points", "batch", "heads"])
@IMPLEMENTATION
def test_shapes_that_do_not_belong_together_are_refused(name: str, wrong: str) -> None:
    shapes = [(6, 8), (3, 4)]
    value, locations, weights = random_inputs(shapes, 0)
    match wrong:
        case "maps":
            shapes = [(60, 60), (3, 4)]
        case "levels":
            shapes = [(6, 10)]
        case "points":
            locations = locations[..., :2, :]
        case "batch":
            value = value[:1]
        case "heads":
            value = value[:, :, :1]
    with pytest.raises(ValueError, match="belong together"):
        IMPLEMENTATIONS[name][0](value, locations, weights, flat(shapes))


@pytest.mark.parametrize("where", ["location", "weight", "weight outside"])
def test_points_that_are_not_numbers_do_not_give_numbers(where: str) -> None:
    shapes = [(6, 8), (3, 4)]
    value, locations, weights = random_inputs(shapes, 0)
    locations[1, 3, 0, 1, 2] = {"location": float("nan"), "weight": 0.5, "weight outside": 9.0}[where]
    if where != "location":
        weights[1, 3, 0, 1, 2] = float("nan")
    output = sample(value, locations, weights, shapes)
    assert output[1, 3, :4].isnan().all()
    assert output.isfinite().sum() == output.numel() - 4


def test_the_number_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(12, 15), (6, 8)]
    inputs = random_inputs(shapes, 0)
    alone = outputs_and_gradients(sample, inputs, shapes)
    monkeypatch.setattr(cpu_sampling, "FEWEST_POINTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for output, expected in zip(outputs_and_gradients(sample, inputs, shapes), alone, strict=True):
        assert torch.equal(output, expected)


@pytest.mark.parametrize("expand", [False, True])
def test_gradients_of_any_strides_come_back(expand: bool) -> None:
    shapes = [(6, 8), (3, 4)]
    inputs = [x.requires_grad_() for x in random_inputs(shapes, 0)]
    above = torch.ones(()).expand(2, 7, 8).double() if expand else torch.randn(8, 7, 2).double().transpose(0, 2)
    ours, theirs = (torch.autograd.grad(function(*inputs, shapes), inputs, above) for function in (sample, stock))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-10)
