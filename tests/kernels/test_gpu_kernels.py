"""Our kernels for GPUs compute what they replace. Without a GPU, Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

pytest.importorskip("triton", reason="this system has no Triton")

from conftest import textured
from pretext_cases import random_features, randomise, small_detector
from sampling_cases import outputs_and_gradients, random_inputs, stock
from siamese_detr.detection.matching import assign
from siamese_detr.kernels import (
    cpu_sampling,
    deformable_attention,
    feed_forward,
    gpu_layers,
    gpu_linear,
    gpu_photometric,
    gpu_sampling,
    gpu_stem,
    layer_norm,
    linear,
)
from siamese_detr.kernels import gpu_assign as hungarian
from siamese_detr.kernels.fused import Blocks
from siamese_detr.pretext import build_pretext
from siamese_detr.views import ViewConfig
from siamese_detr.views.photometric import augment, processing_order
from siamese_detr.views.plan import draw_photometric

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [[(3, 4)], [(5, 7), (2, 3), (1, 1)]]


@pytest.fixture(autouse=True)
def _for_few_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "LARGE", 0)


@pytest.mark.parametrize(("targets", "queries"), [(1, 1), (4, 9), (10, 100), (7, 7), (20, 130)])
def test_the_assignment_is_scipys(targets: int, queries: int) -> None:
    random = torch.Generator().manual_seed(targets)
    cost = torch.randn(4, targets, queries, generator=random)
    valid = torch.rand(4, targets, generator=random) < 0.8
    found = hungarian.assign(cost.to(DEVICE), valid.to(DEVICE)).cpu()
    expected = torch.zeros_like(found)
    for n in range(4):
        rows = valid[n].nonzero()[:, 0]
        expected[n, rows] = torch.from_numpy(linear_sum_assignment(cost[n, rows])[1])
    assert torch.equal(found, expected)


def test_hard_problems_are_solved_as_cheaply() -> None:
    """Costs of few values: nearly everything ties, and most rows want the same columns."""
    cost = torch.randint(0, 4, (6, 12, 14), generator=torch.Generator().manual_seed(0)).float()
    cost[:, :, 3] -= 5
    valid = torch.ones(6, 12, dtype=torch.bool)
    found = hungarian.assign(cost.to(DEVICE), valid.to(DEVICE)).cpu()
    least = assign(cost[None], valid)[0]
    assert all(len(set(row)) == 12 for row in found.tolist())
    assert torch.equal(cost.gather(2, found[..., None]).sum(1), cost.gather(2, least[..., None]).sum(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_no_numbers_are_taken_last(value: float) -> None:
    cost = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    cost[0] = value
    cost[1, :, 2:4] = value
    found = hungarian.assign(cost.to(DEVICE), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)).cpu()
    assert all(len(set(row)) == 3 for row in found.tolist())
    assert not set(found[1].tolist()) & {2, 3}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("reach", [0.5, 2.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_sampling_is_the_stock_one(
    shapes: list[tuple[int, int]], reach: float, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = tuple(x.to(DEVICE) for x in random_inputs(shapes, 3, dtype=dtype, reach=reach))
    sizes = torch.tensor(shapes, device=DEVICE)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))

    def ours(value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor, shapes: object) -> torch.Tensor:
        return gpu_sampling.sample(value, locations, weights, sizes, starts)

    found, expected = (outputs_and_gradients(function, inputs, shapes) for function in (ours, stock))
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shapes", SHAPES)
def test_offsets_around_references_and_hidden_values_are_those_of_a_cpu(shapes: list[tuple[int, int]]) -> None:
    value, offsets, weights = random_inputs(shapes, 3, reach=8.0)
    random = torch.Generator().manual_seed(3)
    reference = torch.rand(2, 7, len(shapes), 2, dtype=torch.float64, generator=random)
    shown = torch.rand(value.shape[:2], generator=random) > 0.3
    value[~shown] = float("nan")
    sizes = torch.tensor(shapes, device=DEVICE)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))

    def there(value: Any, offsets: Any, weights: Any, reference: Any) -> torch.Tensor:
        return gpu_sampling.sample(value, offsets, weights, sizes, starts, reference, shown.to(DEVICE))

    def here(value: Any, offsets: Any, weights: Any, reference: Any) -> torch.Tensor:
        return cpu_sampling.sample(value, offsets, weights, shapes, reference, shown)

    inputs = value, offsets, weights, reference
    for got, want in zip(gradients(there, *(x.to(DEVICE) for x in inputs)), gradients(here, *inputs), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (2, 0), (4, 1)])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (9, 10)])
def test_pixels_are_arranged_as_without_a_kernel(kernel: int, padding: int, size: tuple[int, int]) -> None:
    images, blocks = torch.randn(2, 3, *size), Blocks(torch.nn.Conv2d(3, 5, kernel, 2, padding))
    expected = blocks.image(images)
    found = gpu_stem.arrange(images.to(DEVICE), blocks.first, tuple(expected.shape[2:]), blocks.channels)
    assert torch.equal(found.cpu(), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(2, 5, 9, 12), (1, 16, 7, 7), (2, 3, 2, 3)])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (5, 1, 2)])
def test_pooling_is_the_stock_one(shape: tuple[int, ...], kernel: int, stride: int, padding: int) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, 0] = float("nan")
    layer = torch.nn.MaxPool2d(kernel, stride, padding)
    assert gpu_stem.MaxPool.suits(layer)
    found = gpu_stem.MaxPool(layer)(images.to(DEVICE)).cpu()
    torch.testing.assert_close(found, layer(images), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_augmentation_is_that_of_one_operation_after_the_other(kind: torch.dtype) -> None:
    parameters = draw_photometric(ViewConfig(), np.random.default_rng(0), (16,))
    parameters[:3, 6] = 2.0, 1.5, 0.1
    sizes = torch.tensor([[36, 48]]).repeat(16, 1)
    sizes[:4] = torch.tensor([[30, 21], [1, 5], [36, 47], [9, 1]])
    pictures = np.stack([np.asarray(textured(n, 48, 36)) for n in range(16)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # channels last, as views arrive
    shown = (torch.arange(36)[:, None] < sizes[:, 0, None, None]) & (torch.arange(48) < sizes[:, 1, None, None])
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    given = images if kind == torch.uint8 else images.float() / 255
    found = gpu_photometric.augment(given.to(DEVICE), parameters, sizes.to(DEVICE), mean, std).cpu()
    order = processing_order(parameters)
    expected = augment((images.float() / 255 * shown[:, None])[order], parameters[order], sizes[order])
    expected = (expected - torch.from_numpy(mean)[:, None, None]) / torch.from_numpy(std)[:, None, None]
    difference = (found[order] - expected).abs() * shown[order, None]
    # Hue is discontinuous where channels tie and rounding decides.
    assert (difference > 1e-3).float().mean() < 1e-3
    assert difference.max() < 0.1
    assert not (found * ~shown[:, None]).any()


class Launches:
    """Takes the place of a kernel and notes how many programs it would be."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return lambda *arguments, **options: None


def test_no_batch_is_too_large_for_a_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 2^31 - 1 programs in a grid's first direction, and 65,535 in the others."""
    launches, many = Launches(), 70_000
    for module, kernels in (
        (gpu_sampling, ("_sum", "_spread")),
        (gpu_photometric, ("_brightness", "_augment", "_blur_lines")),
        (gpu_stem, ("_arrange", "_pool")),
        (gpu_layers, ("_relu_dropout", "_relu_dropout_backward", "_add_norm", "_add_norm_backward")),
        (gpu_linear, ("_sum_rows",)),
    ):
        for name in kernels:
            monkeypatch.setattr(module, name, launches)
    value, points = torch.zeros(many, 1, 1, 1, requires_grad=True), torch.zeros(many, 1, 1, 1, 1, 2)
    levels = torch.tensor([[1, 1]]), torch.tensor([0])
    gpu_sampling.sample(value, points, points[..., 0], *levels).sum().backward()
    parameters = np.zeros((many, 7), np.float32)
    parameters[:, 6] = 1  # blurred
    gpu_photometric.augment(
        torch.zeros(many, 3, 1, 1), parameters, torch.ones(many, 2, dtype=torch.int64), np.zeros(3), np.ones(3)
    )
    gpu_stem.arrange(torch.zeros(many, 1, 1, 1), 0, (1, 1), 8)
    gpu_stem.pool(torch.zeros(many, 1, 1, 1), 1, 1, 0)
    tokens = torch.zeros(gpu_layers.ROWS * many, 1, requires_grad=True)
    weights = (torch.zeros(shape) for shape in ((1, 1), (1,), (1, 1), (1,)))
    branch = gpu_layers.relu_block(tokens, *weights, 0.0, torch.float32)
    gpu_layers.add_norm(torch.nn.LayerNorm(1), tokens, branch, 0.0).sum().backward()
    assert len(launches.grids) == 13
    assert all(size <= 65_535 for grid in launches.grids for size in grid[1:]), launches.grids


def test_the_kernels_compile(tmp_path: Path) -> None:
    """Interpreted, more is allowed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).parents[1] / "compile_kernels.py")]
    subprocess.run(command, check=True, env=environment, timeout=300)


def gradients(function: Any, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What a function gives, and the gradients of its inputs for a random one of that."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    out = function(*inputs)
    above = torch.randn((*out.shape, 2), generator=torch.Generator().manual_seed(9), dtype=out.dtype).to(out.device)
    above = above[..., 0]  # with gaps
    return [out.detach(), *torch.autograd.grad(out, inputs, above)]


def block_inputs(rows: int, size: int, hidden: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(rows)
    shapes = [(2, rows, size), (hidden, size), (hidden,), (size, hidden), (size,)]
    return [torch.randn(shape, generator=random, dtype=dtype).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize(("rows", "size", "hidden"), [(1, 3, 5), (9, 6, 140), (150, 8, 33)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_feed_forward_blocks_are_the_stock_ones(
    rows: int, size: int, hidden: int, dtype: torch.dtype, tolerance: float
) -> None:
    def stock(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> torch.Tensor:
        return (x @ w1.t() + b1).relu() @ w2.t() + b2

    inputs = block_inputs(rows, size, hidden, dtype)
    found = gradients(lambda *x: gpu_layers.relu_block(*x, 0.0, dtype), *inputs)
    for got, want in zip(found, gradients(stock, *inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_hidden_values_dropped_have_no_gradient_either() -> None:
    x, w1, b1, w2, b2 = block_inputs(150, 8, 33)
    shown = torch.cat((torch.eye(33, dtype=x.dtype), torch.zeros(8, 33, dtype=x.dtype))).to(DEVICE)
    torch.manual_seed(3)
    kept = gpu_layers.relu_block(x, w1, b1 + 100, shown, shown.new_zeros(41), 0.3, x.dtype)[..., :33] != 0
    assert abs(kept.double().mean() - 0.7) < 0.02
    assert kept.double().mean((0, 1)).std() < 0.05  # no column or row is spared
    assert kept.double().mean(2).std() < 0.1

    def stock(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> torch.Tensor:
        return (x @ w1.t() + b1).relu() * kept / 0.7 @ w2.t() + b2

    torch.manual_seed(3)
    found = gradients(lambda *given: gpu_layers.relu_block(*given, 0.3, x.dtype), x, w1, b1, w2, b2)
    for got, want in zip(found, gradients(stock, x, w1, b1, w2, b2), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the factor is in single precision


@pytest.mark.parametrize("probability", [0.0, 0.5])
def test_what_is_no_number_stays_so(probability: float) -> None:
    x, *weights = block_inputs(9, 6, 140)
    x[0, 3, 2] = float("nan")
    assert gpu_layers.relu_block(x, *weights, probability, x.dtype)[0, 3].isnan().all()
    branch, x = x.float(), torch.randn(2, 9, 6, device=DEVICE)
    branch[0, 3] = float("nan")
    norm = torch.nn.LayerNorm(6).to(DEVICE)
    assert gpu_layers.add_norm(norm, x, branch, probability)[0, 3].isnan().all()


def test_what_is_dropped_here_says_nothing_of_what_is_dropped_elsewhere() -> None:
    rows, size = 64, 1024
    ones = torch.ones(rows, size, device=DEVICE)
    eye, zeros = torch.eye(size, device=DEVICE), torch.zeros(size, device=DEVICE)
    norm = torch.nn.LayerNorm(size).to(DEVICE)

    def of_block() -> torch.Tensor:
        return gpu_layers.relu_block(ones, eye, zeros, eye, zeros, 0.5, torch.float32)

    def of_sum() -> torch.Tensor:
        return gpu_layers.add_norm(norm, 0 * ones, ones, 0.5)

    for draw in (of_block, of_sum):
        kept, other = ((draw() > 0).flatten().float() - 0.5 for _ in range(2))
        assert abs((kept * other).mean()) < 0.004
        for lag in (1, 2, 3, 4, 128, 256, 512, 1024, 2048, 4096, 2 * rows):
            assert abs((kept[lag:] * kept[:-lag]).mean()) < 0.004, lag  # 4 standard deviations


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_feed_forward_blocks_in_half_precision_are_as_exact_as_pytorchs(kind: torch.dtype) -> None:
    inputs = [x / 3 for x in block_inputs(300, 24, 140, torch.float32)]

    def ours(*inputs: Any) -> torch.Tensor:
        return gpu_layers.relu_block(*inputs, 0.0, kind)

    def stock(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> torch.Tensor:
        with torch.autocast(DEVICE, kind):
            linear = torch.nn.functional.linear
            return linear(linear(x, w1, b1).relu(), w2, b2)

    def exact(x: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> torch.Tensor:
        return (x.double() @ w1.double().t() + b1).relu() @ w2.double().t() + b2

    for got, other, want in zip(*(gradients(function, *inputs) for function in (ours, stock, exact)), strict=True):
        assert got.dtype == other.dtype
        assert (got - want).norm() <= 1.02 * (other - want).norm() + 1e-4 * want.norm()


def norm_inputs(rows: int, size: int, half: bool) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(rows)
    x, branch = (5 + torch.randn(2, rows, size, generator=random).to(DEVICE) for _ in range(2))
    weight, bias = (torch.randn(size, generator=random).to(DEVICE) for _ in range(2))
    return x, branch.bfloat16() if half else branch, weight, bias


def summed_norm(x: Any, branch: Any, weight: Any, bias: Any, probability: float = 0.0) -> torch.Tensor:
    norm = torch.nn.LayerNorm(x.shape[-1])
    assert gpu_layers.suits(norm.to(DEVICE), x, branch)
    norm._parameters.update(weight=weight, bias=bias)
    return gpu_layers.add_norm(norm, x, branch, probability)


@pytest.mark.parametrize(("rows", "size"), [(1, 3), (9, 6), (70, 32), (5, 300)])
@pytest.mark.parametrize("half", [False, True])
def test_norms_of_sums_are_the_stock_ones(rows: int, size: int, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def stock(x: Any, branch: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x + branch, x.shape[-1:], weight, bias)

    monkeypatch.setattr(gpu_layers, "PROGRAMS", 7)
    inputs = norm_inputs(rows, size, half)
    for got, want in zip(gradients(summed_norm, *inputs), gradients(stock, *inputs), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "size"), [(1, 3), (70, 32)])
def test_norms_alone_are_the_stock_ones(rows: int, size: int) -> None:
    def stock(x: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias)

    x, _, *parameters = norm_inputs(rows, size, half=False)
    x = 1e-3 * x.transpose(0, 1)  # a variance that is small beside epsilon
    found = gradients(lambda x, *parameters: summed_norm(x, None, *parameters), x, *parameters)
    for got, want in zip(found, gradients(stock, x, *parameters), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("half", [False, True])
def test_what_is_dropped_of_a_branch_has_no_gradient_either(half: bool) -> None:
    x, branch, weight, bias = norm_inputs(70, 32, half)
    torch.manual_seed(3)
    found = gradients(lambda *inputs: summed_norm(*inputs, 0.3), x, branch, weight, bias)
    kept = found[2] != 0
    assert abs(kept.double().mean() - 0.7) < 0.02
    assert kept.double().mean((0, 1)).std() < 0.08
    assert kept.double().mean(2).std() < 0.12

    def stock(x: Any, branch: Any, weight: Any, bias: Any) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x + branch.float() * kept / 0.7, x.shape[-1:], weight, bias)

    for got, want in zip(found, gradients(stock, x, branch, weight, bias), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    assert not torch.equal(summed_norm(x, branch, weight, bias, 0.3), found[0])
    torch.manual_seed(3)
    assert torch.equal(summed_norm(x, branch, weight, bias, 0.3), found[0])


def test_what_kernels_do_not_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, wide = torch.nn.LayerNorm(8), torch.nn.LayerNorm(gpu_layers.WIDEST + 1)
    x = torch.zeros(2, 3, 8)
    assert gpu_layers.suits(norm, x, x.half())
    refused = [(norm, x.double()), (norm, x, x.double()), (norm, x, x[:1]), (norm, x.half()), (norm, x[..., :1])]
    refused += [(wide, x.new_zeros(2, gpu_layers.WIDEST + 1)), (torch.nn.LayerNorm(8, bias=False), x)]
    refused += [(torch.nn.LayerNorm(8).half(), x)]
    assert not any(gpu_layers.suits(*given) for given in refused)
    weight, bias = torch.zeros(4, 8), torch.zeros(4)
    for half in (torch.float16, torch.bfloat16):
        assert gpu_linear.suits(x, weight, bias, half)
        assert gpu_linear.suits(x.to(half), weight, None, half)
    others = [(x, weight, bias, torch.float32), (x.double(), weight, bias, torch.float16), (x[:0], weight, bias, half)]
    others += [(x, weight.half(), bias, torch.float16), (x, weight, bias.half(), torch.float16)]
    others += [(x.bfloat16(), weight, bias, torch.float16)]
    assert not any(gpu_linear.suits(*given) for given in others)
    monkeypatch.setattr(gpu_linear, "LARGE", x.numel() + 1)
    assert not gpu_layers.suits(norm, x)
    assert not gpu_linear.suits(x, weight, bias, torch.float16)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_linear_layers_are_the_stock_ones_and_more_exact(
    kind: torch.dtype, bias: bool, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_linear, "MANY", 0)
    x, weight, shift, *_ = block_inputs(300, 24, 140, torch.float32)
    x = x.transpose(0, 1) if transposed else x
    inputs = (x.to(kind), weight, *([shift] if bias else []))

    def ours(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        assert gpu_linear.suits(x, weight, bias, torch.bfloat16)
        return gpu_linear.linear(x, weight, bias, torch.bfloat16)

    def stock(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return torch.nn.functional.linear(x, weight, bias)

    def exact(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        return torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())

    runs = (gradients(function, *inputs) for function in (ours, stock, exact))
    for got, other, want in zip(*runs, strict=True):
        assert got.dtype == other.dtype
        assert (got - want).norm() <= 1.02 * (other - want).norm() + 1e-3 * want.norm()


@pytest.mark.parametrize("shape", [(1, 1), (300, 5), (513, 140), (0, 3)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_rows_are_summed(shape: tuple[int, int], kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_linear, "MANY", 0)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, kind)
    found = gpu_linear.sum_rows(x, torch.float32)
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", ["conditional-detr", "deformable-detr"])
def test_detectors_learn_by_kernels_what_they_learn_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_feature_levels": 1} if family == "deformable-detr" else {}
    detector = small_detector(family, queries=4, encoder_layers=1, **sizes)
    detector = randomise(build_pretext("detreg", detector)).float().to(DEVICE).detector
    features = random_features(views=1, batch=1, detector=detector).to(DEVICE)
    maps = [x.float() for x in features.maps]

    def gradients(kernels: bool, half: bool) -> dict[str, torch.Tensor]:
        for module in (deformable_attention, feed_forward, layer_norm, linear):
            monkeypatch.setattr(module, "runs_kernels", lambda tensor: kernels)
        detector.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            states = detector.decode(detector.encode(maps, features.pixel_mask, padding=True), None).states
        above = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        (states * above.to(states)).sum().backward()
        return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}

    def error(found: dict[str, torch.Tensor]) -> float:
        assert found.keys() == exact.keys()
        return float(sum((found[name] - value).square().sum() for name, value in exact.items()) / size) ** 0.5

    exact = gradients(kernels=False, half=False)
    size = sum(value.square().sum() for value in exact.values())
    assert 0 < error(gradients(kernels=True, half=False)) < 1e-5
    without, by_kernels = (error(gradients(kernels, half=True)) for kernels in (False, True))
    assert 0 < by_kernels < 0.25
    assert by_kernels != without < 0.25  # so coarse is half precision
