"""Kernels take the place of layers and compute the same; without the package, the option says what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers.utils import import_utils

from sampling_cases import outputs_and_gradients, random_inputs, stock
from siamese_detr.errors import UserError
from siamese_detr.kernels import STOCK_SAMPLING
from siamese_detr.kernels.hub import use_kernels
from tiny_detectors import tiny_detector

KERNEL = """
from torch import nn
from torch.nn.functional import grid_sample

class MultiScaleDeformableAttention(nn.Module):
    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        batch, _, heads, width = value.shape
        levels = value.split([height * length for height, length in value_spatial_shapes_list], dim=1)
        total = 0
        for level, (height, length) in enumerate(value_spatial_shapes_list):
            maps = levels[level].permute(0, 2, 3, 1).reshape(batch * heads, width, height, length)
            grid = 2 * sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
            samples = grid_sample(maps, grid, padding_mode="zeros", align_corners=False)
            weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)
            total = total + (samples * weights[:, None]).sum(-1)
        return total.view(batch, heads * width, -1).transpose(1, 2)

class layers:
    MultiScaleDeformableAttention = MultiScaleDeformableAttention
"""
"""In the form of a repository of the hub, but for any device and not compiled."""


@pytest.mark.skipif(not import_utils.is_kernels_available(), reason="the kernels Transformers asks for are missing")
def test_a_kernel_takes_the_place_of_the_sampling(tmp_path: Path) -> None:
    import kernels

    (tmp_path / "__init__.py").write_text(KERNEL)
    facts = {"name": "sampling", "id": "sampling", "version": 1, "python-depends": [], "license": "x"}
    (tmp_path / "metadata.json").write_text(json.dumps(facts | {"backend": {"type": "cpu"}}))
    layer = kernels.LocalLayerRepository(tmp_path, layer_name="MultiScaleDeformableAttention")
    detector = tiny_detector("deformable-detr").double()
    assert use_kernels(detector.train()) == []  # the hub has none for a CPU
    kernels.register_kernel_mapping({"MultiScaleDeformableAttention": {"cpu": layer}})
    assert use_kernels(detector) == ["MultiScaleDeformableAttention"]
    (sampling, *_) = (part for part in detector.modules() if type(part).__name__ == STOCK_SAMPLING)

    def kernel(value: Tensor, locations: Tensor, weights: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        return sampling(value, None, shapes, None, locations, weights, 64)

    shapes = [(6, 8), (3, 4)]
    inputs = random_inputs(shapes, 0)
    for got, want in zip(
        outputs_and_gradients(kernel, inputs, shapes), outputs_and_gradients(stock, inputs, shapes), strict=True
    ):
        torch.testing.assert_close(got, want)
    assert use_kernels(tiny_detector("detr")) == []


def test_without_the_package_the_option_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)
    with pytest.raises(UserError, match="pip install 'kernels>="):
        use_kernels(tiny_detector("deformable-detr"))
