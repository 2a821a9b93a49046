"""The fast frozen backbone computes what the backbone computes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from siamese_detr.detectors.build import build_detector
from siamese_detr.detectors.functional import backbone_maps
from siamese_detr.kernels import frozen
from siamese_detr.kernels.frozen import FrozenBackbone, conv_norm_pairs, fold, fuse
from siamese_detr.kernels.fused import Blocks, CudnnConv2d, FusedConv2d
from siamese_detr.runtime.hardware import emulates_bf16
from tiny_detectors import needs_onednn


@pytest.mark.parametrize("backbone", ["efficientnet-lite0", "random:resnet18"])
@pytest.mark.filterwarnings("ignore:.*random")
def test_folding_keeps_the_function(backbone: str) -> None:
    network = build_detector("conditional-detr", backbone, num_queries=4, hidden_size=32, decoder_layers=2).backbone
    with torch.no_grad():
        for name, buffer in network.named_buffers():  # fresh batch norms would fold trivially
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(torch.rand_like(buffer))
        images = torch.randn(3, 3, 128, 160)
        expected = backbone_maps(network, images)
    fast = FrozenBackbone(network)
    for got, want in zip(fast(images), expected, strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(conv_norm_pairs(network, images)) == len(convolutions), "every convolution should have been folded"


class OneMap(torch.nn.Sequential):
    """Gives a list of its result."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
        return [super().forward(x)]


def test_new_weights_are_noticed() -> None:
    network = OneMap(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    fast = FrozenBackbone(network)
    images = torch.randn(2, 3, 16, 16)
    before = fast(images)[0]
    with torch.no_grad():
        network[0].weight.mul_(2)
        assert not torch.allclose(before, fast(images)[0])


def test_a_network_without_batch_norms_is_not_run_to_be_folded() -> None:
    class Heavy(OneMap):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:  # type: ignore[override]
            raise AssertionError("this takes long")

    network = Heavy(torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(2, 4))
    folded = fold(network)
    assert torch.equal(folded[0].weight, network[0].weight)
    assert folded[0].weight is not network[0].weight


class Residual(torch.nn.Module):
    """Residual blocks of every kind: the sum read later, given out, or read by the convolutions before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.a, self.b, self.c = (torch.nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 3))
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False)
        self.act, self.act6, self.swish = torch.nn.ReLU(inplace=True), torch.nn.ReLU6(), torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = self.act(self.stem(x))
        y = self.act6(self.a(x))
        x = self.act(self.b(y) + x)
        given = x
        z = self.swish(self.c(x))
        x = self.depthwise(z) + x
        w = self.a(x)
        w += self.c(z)
        return [given, x, self.act(w)]


class Downsampled(torch.nn.Module):
    """The first residual block of a stage: both summands come from convolutions, one of them maybe read again."""

    def __init__(self, given: bool, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1, bias=bias)
        self.shortcut, self.act, self.given = torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), given

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.b(self.act(self.a(x)))
        shortcut = self.shortcut(x)
        return [self.act(y + shortcut), *([shortcut] if self.given else [])]


@pytest.mark.parametrize("given", [False, True])
@needs_onednn
def test_sums_are_written_over_what_a_convolution_made(given: bool) -> None:
    network = Downsampled(given).eval()
    fused = fuse(network)
    assert [m.in_place for m in fused.modules() if isinstance(m, FusedConv2d)].count(True) == (not given)
    images = torch.randn(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for got, want in zip(fused(images), network(images), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@needs_onednn
def test_a_sum_with_its_own_input_is_not_written_over_it() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.a(x)
            return [self.b(y) + y]

    assert not any(m.in_place for m in fuse(Own().eval()).modules() if isinstance(m, FusedConv2d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_convolutions_compute_the_same(dtype: torch.dtype) -> None:
    network = Residual().eval().to(dtype, memory_format=torch.channels_last)
    fused = fuse(network)
    kinds = [type(m) for m in fused.modules()]
    if dtype == torch.bfloat16 and emulates_bf16("cpu"):
        assert fused is network
    elif hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        assert kinds.count(FusedConv2d) == 7  # one is called twice
        assert torch.nn.Conv2d not in kinds
        assert any(m.in_place for m in fused.modules() if isinstance(m, FusedConv2d))
    with torch.no_grad():
        for side in (16, 24, 16, 32, 40, 24):  # more shapes than are kept
            images = torch.randn(2, 3, side, 16, dtype=dtype).contiguous(memory_format=torch.channels_last)
            for got, want in zip(fused(images), network(images), strict=True):
                assert (got - want).abs().max() <= (1e-5 if dtype == torch.float32 else 0.05) * want.abs().max()
    assert all(len(m._packed) == m.kept for m in fused.modules() if isinstance(m, FusedConv2d))


def test_half_precision_stays_plain_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "emulates_bf16", lambda device: True)
    tried: list[bool] = []
    monkeypatch.setattr(frozen, "ConvolutionTracer", lambda: tried.append(True))
    network = Residual().eval().to(torch.bfloat16, memory_format=torch.channels_last)
    assert fuse(network) is network
    assert not tried  # PyTorch would print the traceback of what fails


@pytest.mark.parametrize("groups", [1, 8])
@needs_onednn
def test_any_layout_gives_the_plain_weights_back(groups: int) -> None:
    convolution = torch.nn.Conv2d(8, 24, 3, groups=groups).requires_grad_(False)
    fused = FusedConv2d(convolution)
    for side in (16, 64, 24, 9):
        fused(torch.randn(2, 8, side, 16).contiguous(memory_format=torch.channels_last))
        assert torch.equal(fused.plain(), convolution.weight)
    fused.forget_shapes()
    assert not fused._packed
    assert torch.equal(fused.plain(), convolution.weight)


@needs_onednn
def test_shapes_with_one_layout_share_it() -> None:
    fused = FusedConv2d(torch.nn.Conv2d(8, 24, 3).requires_grad_(False))
    for images, side in ((1, 16), (2, 16), (1, 24), (2, 24)):
        fused(torch.randn(images, 8, side, side).contiguous(memory_format=torch.channels_last))
    layouts = {torch.ops.mkldnn._get_mkldnn_serialized_md(w).numpy().tobytes() for w in fused._packed.values()}
    assert len(fused._packed) == 4
    assert len({id(w) for w in fused._packed.values()}) == len(layouts)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet50", 53), ("tf_efficientnet_lite0", 43)])
@needs_onednn
def test_backbones_are_fused(name: str, convolutions: int) -> None:
    network = timm.create_model(name, features_only=True, out_indices=(2, 3, 4)).eval()
    fused = fuse(fold(network))
    calls = [m for m in fused.modules() if isinstance(m, FusedConv2d)]
    assert len(calls) == convolutions
    assert sum(type(m) in (torch.nn.ReLU, torch.nn.ReLU6) for m in fused.modules()) <= 5


def test_what_cannot_be_traced_stays_as_it_is() -> None:
    class Deciding(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = torch.nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.convolution(x if x.sum() > 0 else -x)]

    network = Deciding()
    assert fuse(network) is network
    precise = Residual().double()
    assert fuse(precise) is precise


@pytest.fixture
def _cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What cuDNN has in one operation each, spelled out; rounded once. It takes no single numbers for sizes."""

    def plain(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> torch.Tensor:
        assert all(len(size) == 2 for size in (stride, padding, dilation))
        bias = None if bias is None else bias.float()
        return torch.nn.functional.conv2d(x.float(), weight.float(), bias, stride, padding, dilation, groups)

    def added(x: Any, weight: Any, other: Any, alpha: float, *rest: Any) -> torch.Tensor:
        return (plain(x, weight, *rest) + alpha * other.float()).relu().to(x.dtype)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", lambda x, *rest: plain(x, *rest).relu().to(x.dtype))
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", added)
    monkeypatch.setattr(frozen, "convolution_of", lambda weight: CudnnConv2d)


@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("size", [(64, 96), (63, 97)])
@pytest.mark.filterwarnings("ignore:.*random")
def test_what_is_rewritten_for_cudnn_computes_the_same(size: tuple[int, int]) -> None:
    network = build_detector("conditional-detr", "random:resnet18", hidden_size=32, decoder_layers=2).backbone
    with torch.no_grad():
        for value in [*network.parameters(), *network.buffers()]:
            if value.is_floating_point() and value.ndim == 1:  # fresh batch norms would fold trivially
                value.add_(0.5 * torch.rand_like(value))
        images = torch.randn(2, 3, *size)
        fused = fuse(fold(network))
        for got, want in zip(backbone_maps(fused, images), backbone_maps(network, images), strict=True):
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    layers = [module for module in fused.modules() if isinstance(module, CudnnConv2d)]
    assert len(layers) == 17  # of 20 convolutions: those of the shortcuts have no activation
    assert [layer.blocks is not None for layer in layers] == [True] + 16 * [False]


@pytest.mark.usefixtures("_cudnn")
@pytest.mark.parametrize("network", [Residual(), Downsampled(False), Downsampled(True), Downsampled(False, bias=False)])
def test_any_network_rewritten_for_cudnn_computes_the_same(network: torch.nn.Module) -> None:
    network = network.eval()
    fused, images = fuse(network), torch.randn(2, 3, 32, 48)
    assert any(isinstance(module, CudnnConv2d) for module in fused.modules())
    for got, want in zip(backbone_maps(fused, images), backbone_maps(network, images), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_cudnn")
def test_a_network_that_rounds_coarsely_is_fused_in_half_precision_too() -> None:
    class Cancelling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1, bias=False), torch.nn.ReLU()
            self.b.weight.data = (2**-8 - 1) * torch.eye(8)[:, :, None, None]

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.act(self.a(x))
            return [self.act(self.b(y) + y)]

    network = Cancelling().to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
    fused, images = fuse(network), torch.randn(2, 3, 32, 48, dtype=torch.bfloat16)
    assert sum(isinstance(module, CudnnConv2d) for module in fused.modules()) == 2
    exact = backbone_maps(network.float(), images.float())[0]
    found = backbone_maps(fused, images)[0]
    assert found.dtype == torch.bfloat16
    assert (found - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize(("kernel", "padding"), [(7, 3), (3, 1), (3, 0), (2, 0), (1, 0), (4, 1), (6, 2), (3, 2)])
@pytest.mark.parametrize("size", [(32, 48), (33, 47), (9, 10)])
def test_a_convolution_over_blocks_is_that_of_stride_two(kernel: int, padding: int, size: tuple[int, int]) -> None:
    convolution = torch.nn.Conv2d(3, 5, kernel, 2, padding, dtype=torch.float64)
    images, blocks = torch.randn(2, 3, *size, dtype=torch.float64), Blocks(convolution)
    assert Blocks.suit(convolution)
    found = torch.nn.functional.conv2d(
        blocks.image(images), blocks.weight(convolution.weight.detach()), convolution.bias
    )
    torch.testing.assert_close(found, convolution(images))


@pytest.mark.parametrize(
    ("count", "most", "expected"), [(512, 190, 128), (10, 20, 20), (7, 3, 3), (97, 96, 96), (5, 1, 1)]
)
def test_chunks_on_a_gpu_have_one_size(count: int, most: int, expected: int) -> None:
    assert frozen.even(count, most) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_have_their_channels_last(dtype: torch.dtype) -> None:
    images = torch.randn(5, 3, 10, 12)
    for given in (images, images[..., :8], images.contiguous(memory_format=torch.channels_last)[:, :, :, :8]):
        chunks = list(frozen.split(given, 2, dtype))
        assert torch.equal(torch.cat(chunks), given.to(dtype))
        assert all(chunk.is_contiguous(memory_format=torch.channels_last) for chunk in chunks)


def test_weights_do_not_change_device_and_precision_at_once() -> None:
    """From Apple's GPUs into double precision that fails or, silently, gives zeros (PyTorch 2.14)."""
    weight = (8, 3, 3, 3)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func is torch.ops.aten._to_copy.default and args[0].shape == weight and kwargs["dtype"] != args[0].dtype:
                copies.append("device" in kwargs)
            return func(*args, **kwargs)

    copies: list[bool] = []
    with Copies():
        fold(OneMap(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
    assert copies == [False, False]  # into double precision and back
