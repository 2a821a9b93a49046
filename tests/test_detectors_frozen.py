"""The fast frozen backbone computes what the backbone computes."""

from __future__ import annotations

import copy

import pytest
import torch

from siamese_detr.detectors.build import build_detector
from siamese_detr.detectors.frozen import FrozenBackbone, PackedConv2d, conv_norm_pairs, pack, run


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "random:resnet18"])
@pytest.mark.filterwarnings("ignore:.*random")
def test_folding_keeps_the_function(backbone: str) -> None:
    network = build_detector("conditional-detr", backbone, num_queries=4, hidden_size=32, decoder_layers=2).backbone
    with torch.no_grad():
        for name, buffer in network.named_buffers():  # fresh batch norms would fold trivially
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
        images = torch.randn(3, 3, 128, 160)
        expected = run(network, images)
    fast = FrozenBackbone(network)
    for got, want in zip(fast(images), expected, strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(conv_norm_pairs(network, images)) == len(convolutions), "every convolution should have been folded"


def test_new_weights_are_noticed() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    wrapped = torch.nn.Module()
    wrapped.inner = network
    wrapped.forward = lambda x: [network(x)]  # type: ignore[method-assign]
    fast = FrozenBackbone(wrapped)
    images = torch.randn(2, 3, 16, 16)
    before = fast(images)[0]
    with torch.no_grad():
        network[0].weight.mul_(2)
        assert not torch.allclose(before, fast(images)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_compute_the_same(dtype: torch.dtype) -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, stride=2, padding=1),
        torch.nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=16, bias=False),
        torch.nn.Conv2d(16, 8, 1),
    ).to(dtype, memory_format=torch.channels_last)
    packed = copy.deepcopy(network)
    pack(packed)
    assert list(packed.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        for side in (16, 24, 16, 32, 24):  # more shapes than are kept
            images = torch.randn(2, 3, side, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(packed(images), network(images))
    kept = [len(module._packed) for module in packed if isinstance(module, PackedConv2d)]
    assert kept in ([], [PackedConv2d.kept] * 3)  # no entry: this build of PyTorch cannot pack
