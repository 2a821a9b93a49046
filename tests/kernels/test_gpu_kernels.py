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
from siamese_detr.detection.matching import assign
from siamese_detr.kernels import gpu_assign, gpu_photometric, gpu_sampling
from siamese_detr.views import photometric
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.plan import draw_photometric

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("targets", "queries"), [(1, 1), (4, 9), (10, 100), (7, 7), (20, 130)])
def test_the_assignment_is_scipys(targets: int, queries: int) -> None:
    random = torch.Generator().manual_seed(targets)
    cost = torch.randn(4, targets, queries, generator=random)
    valid = torch.rand(4, targets, generator=random) < 0.8
    found = gpu_assign.assign(cost.to(DEVICE), valid.to(DEVICE)).cpu()
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
    found = gpu_assign.assign(cost.to(DEVICE), valid.to(DEVICE)).cpu()
    least = assign(cost, valid)
    assert all(len(set(row)) == 12 for row in found.tolist())
    assert torch.equal(cost.gather(2, found[..., None]).sum(1), cost.gather(2, least[..., None]).sum(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_no_numbers_are_taken_last(value: float) -> None:
    cost = torch.rand(2, 3, 6, generator=torch.Generator().manual_seed(0))
    cost[0] = value
    cost[1, :, 2:4] = value
    found = gpu_assign.assign(cost.to(DEVICE), torch.ones(2, 3, dtype=torch.bool, device=DEVICE)).cpu()
    assert all(len(set(row)) == 3 for row in found.tolist())
    assert not set(found[1].tolist()) & {2, 3}


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_the_augmentation_is_the_reference(kind: torch.dtype) -> None:
    parameters = draw_photometric(ViewConfig(), np.random.default_rng(0), (16,))
    parameters[:3, 6] = 2.0, 1.5, 0.1
    sizes = torch.tensor([[36, 48]]).repeat(16, 1)
    sizes[:4] = torch.tensor([[30, 21], [1, 5], [36, 47], [9, 1]])
    pictures = np.stack([np.asarray(textured(n, 48, 36)) for n in range(16)])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)  # channels last, as views arrive
    shown = (torch.arange(36)[:, None] < sizes[:, 0, None, None]) & (torch.arange(48) < sizes[:, 1, None, None])
    normal = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    given = images if kind == torch.uint8 else images.float() / 255
    output = gpu_photometric.augment(given.to(DEVICE), torch.from_numpy(parameters), sizes.to(DEVICE), *normal).cpu()
    expected = photometric.augment(images, torch.from_numpy(parameters), sizes, *normal)
    difference = (output - expected).abs()
    # Hue is discontinuous where channels tie and rounding decides.
    assert (difference > 5e-3).float().mean() < 1e-3
    assert difference.max() < 0.5
    assert not (output * ~shown[:, None]).any()


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
    ):
        for name in kernels:
            monkeypatch.setattr(module, name, launches)
    value, points = torch.zeros(many, 1, 1, 1, requires_grad=True), torch.zeros(many, 1, 1, 1, 1, 2)
    given = (value.detach(), points, points[..., 0])
    gpu_sampling.sample(*given, [1, 1])
    gpu_sampling.sample_backward(torch.zeros(many, 1, 1), *given, [1, 1])
    parameters = np.zeros((many, 7), np.float32)
    parameters[:, 6] = 1  # blurred
    sizes = torch.ones(many, 2, dtype=torch.int64)
    gpu_photometric.augment(torch.zeros(many, 3, 1, 1), torch.from_numpy(parameters), sizes, [0.0] * 3, [1.0] * 3)
    assert len(launches.grids) == 6
    assert all(size <= 65_535 for grid in launches.grids for size in grid[1:]), launches.grids


def test_the_kernels_compile(tmp_path: Path) -> None:
    """Interpreted, more is allowed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).parents[1] / "compile_kernels.py")]
    subprocess.run(command, check=True, env=environment, timeout=300)
