"""Our sampling of deformable attention computes what Transformers' does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

from sampling_cases import outputs_and_gradients, random_inputs, stock
from siamese_detr.kernels import cpu_sampling, deformable_attention
from siamese_detr.kernels.cpu_sampling import sample
from siamese_detr.kernels.deformable_attention import DeformableAttention, Sampling, install, project_sum, uninstall
from tiny_detectors import fitting_side, tiny_batch, tiny_detector


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.integers(0, 1000),
    st.sampled_from([0.5, 2.0, 100.0]),
)
def test_values_and_gradients_are_the_stock_ones(shapes: list[tuple[int, int]], seed: int, reach: float) -> None:
    inputs = random_inputs(shapes, seed, reach=reach)
    ours, theirs = (outputs_and_gradients(function, inputs, shapes) for function in (sample, stock))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 1000))
def test_offsets_in_cells_around_a_reference_are_locations(shapes: list[tuple[int, int]], seed: int) -> None:
    value, offsets, weights = random_inputs(shapes, seed, reach=8.0)
    reference = torch.rand(2, 7, len(shapes), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    sizes = torch.tensor([(width, height) for height, width in shapes])

    def around(*inputs: Any) -> Tensor:
        value, offsets, weights, reference, shapes = inputs
        return sample(value, offsets, weights, shapes, reference)

    def located(*inputs: Any) -> Tensor:
        value, offsets, weights, reference, shapes = inputs
        return stock(value, reference[:, :, None, :, None] + offsets / sizes[:, None], weights, shapes)

    ours, theirs = (
        outputs_and_gradients(function, (value, offsets, weights, reference), shapes) for function in (around, located)
    )
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4), st.integers(0, 1000))
def test_what_is_not_shown_is_read_as_zeros(shapes: list[tuple[int, int]], seed: int) -> None:
    inputs = random_inputs(shapes, seed)
    shown = torch.rand(inputs[0].shape[:2], generator=torch.Generator().manual_seed(seed)) > 0.5
    inputs[0][~shown] = torch.nan

    def hidden(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return sample(value, locations, weights, shapes, shown=shown)

    def masked(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return stock(value.masked_fill(~shown[..., None, None], 0), locations, weights, shapes)

    ours, theirs = (outputs_and_gradients(function, inputs, shapes) for function in (hidden, masked))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_single_precision_rounds_alike() -> None:
    shapes = [(12, 15), (6, 8)]
    inputs = random_inputs(shapes, 0, torch.float32)
    ours, theirs = (outputs_and_gradients(function, inputs, shapes) for function in (sample, stock))
    for got, want in zip(ours, theirs, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_the_number_of_threads_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(12, 15), (6, 8)]
    inputs = random_inputs(shapes, 0)
    alone = outputs_and_gradients(sample, inputs, shapes)
    monkeypatch.setattr(cpu_sampling, "FEWEST_POINTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    asked, run = [], cpu_sampling.on_all_threads
    monkeypatch.setattr(cpu_sampling, "on_all_threads", lambda *given: (asked.append(given[2]), run(*given)))
    for got, want in zip(outputs_and_gradients(sample, inputs, shapes), alone, strict=True):
        assert torch.equal(got, want)
    assert asked == [None, None]  # forward and backward, on all


def test_half_precision_is_computed_in_single() -> None:
    shapes = [(6, 8)]
    value, locations, weights = random_inputs(shapes, 0, torch.float32)
    half = sample(value.bfloat16(), locations, weights, shapes)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, sample(value.bfloat16().float(), locations, weights, shapes).bfloat16())


def test_a_point_just_before_the_last_cell_ends_reads_almost_nothing() -> None:
    below = torch.tensor(64.0).nextafter(torch.tensor(0.0))  # one more, rounded, is 65
    offsets = torch.stack((torch.tensor(0.0), below)).view(1, 1, 1, 1, 1, 2).repeat(1, 1, 1, 2, 1, 1)
    weights = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2, 1)
    reference = torch.tensor([0.5, 0.5 / 64]).repeat(1, 1, 2, 1)
    out = sample(torch.ones(1, 65, 1, 4), offsets, weights, [(64, 1), (1, 1)], reference)
    torch.testing.assert_close(out, (64 - below).expand(1, 1, 4), rtol=0, atol=1e-7)


@pytest.mark.parametrize("where", ["location", "weight", "weight outside"])
def test_points_that_are_no_numbers_give_no_numbers(where: str) -> None:
    shapes = [(6, 8), (3, 4)]
    value, locations, weights = random_inputs(shapes, 0)
    locations[1, 3, 0, 1, 2] = {"location": float("nan"), "weight": 0.5, "weight outside": 9.0}[where]
    if where != "location":
        weights[1, 3, 0, 1, 2] = float("nan")
    out = sample(value, locations, weights, shapes)
    assert out[1, 3, :4].isnan().all()
    assert out.isfinite().sum() == out.numel() - 4


@pytest.mark.parametrize("expand", [False, True])
def test_gradients_of_any_strides_come_back(expand: bool) -> None:
    shapes = [(6, 8), (3, 4)]
    inputs = [x.requires_grad_() for x in random_inputs(shapes, 0)]
    above = torch.ones(()).expand(2, 7, 8).double() if expand else torch.randn(8, 7, 2).double().transpose(0, 2)
    ours, theirs = (torch.autograd.grad(function(*inputs, shapes), inputs, above) for function in (sample, stock))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("batch", "queries"), [(0, 7), (2, 0)])
def test_nothing_to_sample(batch: int, queries: int) -> None:
    value, locations, weights = random_inputs([(6, 8)], 0)
    inputs = (value[:batch], locations[:batch, :queries], weights[:batch, :queries])
    out, *gradients = outputs_and_gradients(sample, inputs, [(6, 8)])
    assert out.shape == (batch, queries, 8)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("wrong", ["maps", "levels", "points", "reference", "shown", "batch", "heads"])
def test_shapes_that_do_not_belong_together_are_refused(wrong: str) -> None:
    shapes = [(6, 8), (3, 4)]
    value, locations, weights = random_inputs(shapes, 0)
    reference, shown = torch.zeros(2, 7, 2, 2), torch.ones(2, 60, dtype=torch.bool)
    match wrong:
        case "maps":
            shapes = [(60, 60), (3, 4)]
        case "levels":
            shapes = [(6, 10)]
        case "points":
            locations = locations[..., :2, :]
        case "reference":
            reference = reference[:, :1]
        case "shown":
            shown = shown[:, :-1]
        case "batch":
            value = value[:1]
        case "heads":
            value = value[:, :, :1]
    with pytest.raises(ValueError, match="belong together"):
        sample(value, locations, weights, shapes, reference, shown)


def test_gradients_only_where_wanted() -> None:
    shapes = [(6, 8)]
    value, locations, weights = random_inputs(shapes, 0)
    locations.requires_grad_()
    sample(value, locations, weights, shapes).sum().backward()
    assert locations.grad is not None
    assert value.grad is None


@pytest.mark.parametrize(
    "case",
    ["deformable-detr", "deformable-detr-one-scale", "deformable-detr-refined", "rt-detr", "lw-detr", "rf-detr"],
)
def test_a_detector_is_what_it_was(case: str) -> None:
    detector = tiny_detector(case).double().eval()
    images, mask = tiny_batch(side=fitting_side(detector))
    names = list(detector.state_dict())
    assert any(isinstance(module, Sampling) for module in detector.modules())

    def boxes_and_gradients() -> tuple[Tensor, dict[str, Tensor]]:
        detector.zero_grad()
        _, boxes = detector(images.double(), mask)
        boxes.sum().backward()
        return boxes, {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}

    ours = boxes_and_gradients()
    assert uninstall(detector.model)
    kinds = {type(module) for module in detector.modules()}
    assert not kinds & {Sampling, DeformableAttention}
    theirs = boxes_and_gradients()
    assert ours[1].keys() == theirs[1].keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert list(detector.state_dict()) == names
    assert install(detector.model)
    assert not install(detector.model)


@pytest.mark.parametrize("precision", ["double", "half"])
def test_projections_of_a_sum_are_those_of_the_layers_without_the_sum_being_kept(precision: str) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, width).double() for width in (6, 3)]
    x, position = (torch.randn(2, 500, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    if precision == "half":
        x, position = x.detach().float().requires_grad_(), position.detach().float().requires_grad_()
    kept: set[int] = set()

    def stock(x: Tensor, position: Tensor, *layers: torch.nn.Linear) -> tuple[Tensor, ...]:
        return tuple(layer(x + position) for layer in layers)

    def compute(function: Any) -> list[Tensor]:
        kept.clear()
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=precision == "half"),
        ):
            outputs = function(x, position, *(layer.to(x.dtype) for layer in layers))
        wanted = [x, position, *(parameter for layer in layers for parameter in layer.parameters())]
        return [*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), wanted)]

    theirs = compute(stock)
    ours = compute(project_sum)
    assert kept >= {x.data_ptr(), position.data_ptr()}
    assert len(kept) == 4  # and the weights
    for got, want in zip(ours, theirs, strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() <= (1e-2 if precision == "half" else 1e-12) * want.norm()


@pytest.mark.parametrize("kernel", [False, True])
def test_a_kernel_that_was_asked_for_goes_before_ours(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "runs_kernels", lambda tensor: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know meta tensors
    gpu_sampling = pytest.importorskip("siamese_detr.kernels.gpu_sampling", reason="this system has no Triton")
    monkeypatch.setattr(gpu_sampling, "sample", lambda *arguments: "ours")
    layer = MultiScaleDeformableAttention()
    if kernel:
        layer.forward = lambda *arguments: "theirs"
    value = torch.zeros(1, 4, 1, 2, device="meta")
    assert Sampling(layer)(value, None, [(2, 2)], None, value, value, 64) == ("theirs" if kernel else "ours")


@pytest.mark.parametrize("autocast", [False, True])
def test_elsewhere_places_keep_their_precision_if_the_stock_module_can(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)
    value, points = (torch.zeros(1, device="meta", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    layer = torch.nn.Module()
    layer.forward = lambda value, sizes, shapes, starts, locations, weights, step: (locations.dtype, weights.dtype)
    precision = torch.float32 if autocast else torch.bfloat16
    assert Sampling(layer)(value, None, [(1, 1)], None, points, points, 64) == (precision, precision)
