"""The frozen backbone, run as fast as its being frozen allows: batch norms folded into the convolutions before them, no
autograd, channels last, sums and activations computed inside the convolutions; on a CPU in chunks that stay in its
caches.

The function is the same; the sums are rounded in another order (relative difference about 2e-6 in float32). A network
in which folding would change anything else is left as it is.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from siamese_detr.detectors.functional import backbone_maps
from siamese_detr.kernels.fused import ConvolutionTracer, CudnnConv2d, FusedConv2d, drop_identities, fuse_convolutions
from siamese_detr.runtime.hardware import emulates_bf16

log = logging.getLogger(__name__)

CHUNK_PIXELS = 8 * 128 * 128
"""Pixels per chunk on a CPU: larger ones spill activations out of the caches (measured: up to 3 times slower)."""

MOST_PIXELS = 1 << 25
"""Pixels at once elsewhere: a network's largest maps then have some 2^29 values, and cuDNN's fused convolutions take no
more than 2^31."""


class FrozenBackbone:
    """Runs a frozen backbone.

    Args:
        backbone: gives one or several (B, C, h, w) maps, as a list or as ``feature_maps``; it is not changed. Its
            weights may be loaded again or moved at any time.
        side: sides of an image it can take, in pixels.
    """

    def __init__(self, backbone: nn.Module, side: int = 64) -> None:
        self.backbone, self.side = backbone, side
        self._folded: nn.Module | None = None
        self._made_from: tuple[object, ...] = ()

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor) -> list[Tensor]:
        """Maps (B, C, h, w) of ``pixel_values`` (B, 3, H, W), finest first, without gradient."""
        device = pixel_values.device.type
        cast = torch.is_autocast_enabled(device) and pixel_values.dtype != torch.float64
        # Under autocast the weights are cast once, here, and not at every call.
        dtype = torch.get_autocast_dtype(device) if cast else pixel_values.dtype
        with torch.autocast(device, enabled=False):
            network = self.network(dtype)
            area = math.prod(pixel_values.shape[-2:])
            if device == "cpu":
                size = max(1, CHUNK_PIXELS // area)
            else:
                size = even(len(pixel_values), max(1, MOST_PIXELS // area))
            chunks = [backbone_maps(network, chunk) for chunk in split(pixel_values, size, dtype)]
        return chunks[0] if len(chunks) == 1 else [torch.cat(level) for level in zip(*chunks, strict=True)]

    def network(self, dtype: torch.dtype) -> nn.Module:
        """The folded and fused copy in ``dtype``, made again when the backbone's weights have changed."""
        state = [*self.backbone.parameters(), *self.backbone.buffers()]
        made_from = (dtype, *((x.data_ptr(), x._version, x.dtype, x.device) for x in state))
        if self._folded is None or made_from != self._made_from:
            self._folded = fuse(fold(self.backbone, self.side).to(dtype), self.side)
            self._made_from = made_from
        return self._folded


def even(count: int, most: int) -> int:
    """A size of chunks, up to ``most``, that leaves no smaller last one of ``count``, if there is one not too small:
    cuDNN plans again, for 3 ms a layer, for every new size."""
    return next((size for size in range(most, most // 2, -1) if count % size == 0), most)


def split(images: Tensor, size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """``images`` (B, C, H, W) in chunks of ``size``, channels last."""
    layout: Any = {"memory_format": torch.channels_last}
    # In one pass: `to` alone leaves gaps between rows where nothing else is to change.
    return (chunk.to(dtype, **layout).contiguous(**layout) for chunk in images.split(size))


def probe(like: Tensor, side: int) -> Tensor:
    """An image (1, 3, side, side) to try a network on."""
    return torch.linspace(-2, 2, 3 * side * side).sin().view(1, 3, side, side).to(like)


@torch.no_grad()
def fold(backbone: nn.Module, side: int = 64) -> nn.Module:
    """A copy of ``backbone`` in evaluation mode, channels last, its batch norms in the convolutions before them."""
    if not any(is_norm(module) for module in backbone.modules()):
        return copy.deepcopy(backbone).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    weight = next(backbone.parameters())
    # Where double precision exists: with less, some devices are too inexact to tell whether the function is the same.
    # Moved first: from MPS, one copy that does both fails, or gives zeros in PyTorch 2.14.
    folded = copy.deepcopy(backbone).eval().requires_grad_(False).to("cpu").to(torch.float64)
    images = probe(next(folded.parameters()), side)
    expected = backbone_maps(folded, images)
    for convolution, norm_name in conv_norm_pairs(folded, images).items():
        norm: Any = folded.get_submodule(norm_name)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var,
            getattr(norm, "eps", 1e-5), norm.weight, norm.bias,
        )  # fmt: skip
        # timm's batch norms carry the activation that follows them.
        folded.set_submodule(norm_name, getattr(norm, "act", nn.Identity()))
    if not as_exact(backbone_maps(folded, images), expected, expected, 1e-3):
        folded = copy.deepcopy(backbone).eval().requires_grad_(False)
    return folded.to(weight.dtype).to(weight.device).to(memory_format=torch.channels_last)


@torch.no_grad()
def fuse(network: nn.Module, side: int = 64) -> nn.Module:
    """A copy of the folded ``network`` whose convolutions add residuals and apply activations themselves.

    Only where oneDNN or cuDNN computes in its precision, its graph can be traced, and the result is the same; else
    ``network`` itself. In half precision, rounding alone can add up to much: whether the result is the same is looked
    at in single precision first.
    """
    weight = next(network.parameters())
    fused_kind = convolution_of(weight)
    if fused_kind is None:
        return network
    images = probe(weight, side).contiguous(memory_format=torch.channels_last)
    exact = backbone_maps(copy.deepcopy(network).double(), images.double())
    fused = network
    for dtype in dict.fromkeys((torch.float32, weight.dtype)):
        plain, seen = network if dtype == weight.dtype else copy.deepcopy(network).to(dtype), images.to(dtype)
        expected = backbone_maps(plain, seen)
        try:
            fused = rewritten(plain, fused_kind)
            found = backbone_maps(fused, seen)
        except Exception as error:  # tracing calls the network's own code with what are no tensors: anything may come
            log.debug("the frozen backbone stays as it is: %s", error)
            return network
        if not as_exact(found, expected, exact, 1e-4 if dtype == torch.float32 else 1e-2):
            log.debug("the frozen backbone stays as it is: fused, it computes something else in %s", dtype)
            return network
    for module in fused.modules():
        if isinstance(module, FusedConv2d):
            module.forget_shapes()  # the probe's will not come again
    return fused


def as_exact(found: list[Tensor], expected: list[Tensor], exact: list[Tensor], tolerance: float) -> bool:
    """Whether maps are not much farther from the exact ones than those expected, which may be rounded, too."""
    return all(
        bool((x - z).abs().max() <= 3 * (y - z).abs().max() + tolerance * z.abs().max())
        for x, y, z in zip(found, expected, exact, strict=True)
    )


def rewritten(network: nn.Module, kind: type[FusedConv2d] | type[CudnnConv2d]) -> nn.Module:
    """A copy of ``network`` with convolutions of ``kind``."""
    copied: Any = copy.deepcopy(network)
    wrapped = hasattr(copied, "_backbone")  # by Transformers
    inner = copied._backbone if wrapped else copied
    traced = fx.GraphModule(inner, ConvolutionTracer().trace(inner))
    drop_identities(traced)
    fuse_convolutions(traced, kind)
    if not wrapped:
        return traced
    copied._backbone = traced
    return copied


def convolution_of(weight: Tensor) -> type[FusedConv2d] | type[CudnnConv2d] | None:
    """What fuses convolutions of such weights; None: nothing does."""
    if weight.device.type == "cpu":
        computed = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and not emulates_bf16("cpu"))
        return FusedConv2d if computed and hasattr(torch.ops.mkldnn, "_convolution_pointwise") else None
    if weight.is_cuda and weight.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return CudnnConv2d if torch.backends.cudnn.is_available() and torch.version.hip is None else None
    return None


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm, of whatever class, that can be folded."""
    return getattr(module, "running_mean", None) is not None and getattr(module, "weight", None) is not None


def conv_norm_pairs(network: nn.Module, images: Tensor) -> dict[nn.Conv2d, str]:
    """Every convolution whose output a batch norm, by its name, takes in as it is, seen in one forward pass."""
    makers: dict[int, tuple[nn.Module, Tensor]] = {}  # the reference to the output keeps its id unique
    pairs: dict[nn.Conv2d, str] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda made, _, x: makers.update({id(x): (made, x)})))
        elif is_norm(module):

            def pair(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in makers:
                    pairs[makers[id(inputs[0])][0]] = name  # type: ignore[index]

            hooks.append(module.register_forward_pre_hook(pair))
    try:
        backbone_maps(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs
