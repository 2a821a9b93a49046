"""Region pooling, and the heads of pre-training."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torchvision.ops import roi_align

from siamese_detr.errors import UserError
from siamese_detr.pretext.features import pool_regions, region_of_query
from siamese_detr.pretext.heads import BatchNorm, GlobalHead


def by_roi_align(maps, boxes, strides):
    """The definition: 7 × 7 bins, averaged, image by image."""
    views, batch, _, _ = boxes.shape
    rows = []
    for image, regions in enumerate(boxes.flatten(0, 1)):
        levels = [
            roi_align(level[image : image + 1], [regions], 7, 1 / stride, aligned=False).mean((2, 3))
            for level, stride in zip(maps, strides, strict=True)
        ]
        rows.append(torch.cat(levels, -1))
    return torch.stack(rows).unflatten(0, (views, batch))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20), st.sampled_from([4, 32]))
def test_pooling_is_the_mean_of_roi_align(seed, height, width, stride):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(2, 1, 6, 4, generator=generator, dtype=torch.float64)
    low, high = torch.minimum(draw[..., :2], draw[..., 2:]), torch.maximum(draw[..., :2], draw[..., 2:])
    boxes = torch.cat([low, high], -1) * torch.tensor([width, height] * 2) * stride
    maps = [torch.randn(2, 3, height, width, generator=generator, dtype=torch.float64)]
    assert_close(pool_regions(maps, boxes, [stride]), by_roi_align(maps, boxes, [stride]))


def test_levels_are_concatenated_and_the_memory_layout_does_not_matter():
    maps = [torch.randn(4, 3, 16, 12), torch.randn(4, 5, 8, 6)]
    boxes = torch.tensor([3.0, 5.0, 40.0, 60.0]).expand(2, 2, 1, 4)
    pooled = pool_regions(maps, boxes, [4, 8])
    assert pooled.shape == (2, 2, 1, 8)
    assert_close(pooled, by_roi_align(maps, boxes.contiguous(), [4, 8]))
    fast = [level.to(memory_format=torch.channels_last) for level in maps]
    assert_close(pool_regions(fast, boxes, [4, 8]), pooled)


def test_padding_does_not_leak_into_regions_at_the_edge_of_the_picture():
    level = torch.randn(1, 3, 6, 8, dtype=torch.float64)
    level[..., 3:, :] = 1e6
    level[..., 5:] = 1e6
    boxes = torch.tensor([[[[32.0, 16.0, 150.0, 90.0], [0.0, 0.0, 150.0, 96.0]]]], dtype=torch.float64)
    sizes = torch.tensor([[96, 150]])  # 3 × 5 cells of 32 pixels
    alone = pool_regions([level[..., :3, :5]], boxes, [32])
    assert_close(pool_regions([level], boxes, [32], sizes), alone)
    assert pool_regions([level], boxes, [32]).max() > 1e3


def test_a_constant_map_pools_to_its_constant():
    boxes = torch.rand(1, 2, 5, 2).sort(-2).values
    boxes = torch.cat([boxes, boxes + 30], -1)
    sizes = torch.tensor([[64, 64], [64, 64]])
    assert_close(pool_regions([torch.full((2, 1, 2, 2), 3.0)], boxes, [32], sizes), torch.full((1, 2, 5, 1), 3.0))


def test_regions_are_repeated_in_a_row():
    assert region_of_query(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert region_of_query(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    with pytest.raises(UserError, match="at least 3 queries"):
        region_of_query(2, 3)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_pytorchs(training):
    ours, theirs = BatchNorm(5).double().train(training), nn.BatchNorm1d(5).double().train(training)
    with torch.no_grad():
        ours.weight.uniform_(0.5, 2)
        ours.bias.normal_()
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(4, 5, dtype=torch.float64).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outputs = [norm(x) for norm, x in zip((ours, theirs), inputs, strict=True)]
    assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert_close(inputs[0].grad, inputs[1].grad)
    for name, value in theirs.state_dict().items():
        assert_close(ours.state_dict()[name], value)


def test_global_head_with_one_image_is_finite():
    head = GlobalHead(8, 6, 6, 4).train()
    predictions, projections = head(torch.randn(2, 1, 8))
    assert predictions.shape == projections.shape == (2, 1, 6)
    (predictions.sum() + projections.sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert head.state_dict()["projector.1.running_var"].isfinite().all()
