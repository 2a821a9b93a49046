"""The frozen backbone, run as fast as its being frozen allows: batch norms folded into the convolutions before them, no
autograd, channels last, and on a CPU in chunks that stay in its caches.

The function is the same; the sums are rounded in another order (relative difference about 1e-6 in float32). A network
in which folding would change anything else is left as it is.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

CHUNK_PIXELS = 8 * 128 * 128
"""Pixels per chunk on a CPU: larger ones spill activations out of the caches (measured: up to 3 times slower)."""


class FrozenBackbone:
    """Runs a frozen backbone.

    Args:
        backbone: gives one or several (B, C, h, w) maps, as a list or as ``feature_maps``; it is not changed. Its
            weights may be loaded anew or moved at any time.
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
        # Under autocast the weights are cast once, here, and not at every call.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else pixel_values.dtype
        pixel_values = pixel_values.to(dtype)
        size = max(1, CHUNK_PIXELS // math.prod(pixel_values.shape[-2:])) if device == "cpu" else len(pixel_values)
        with torch.autocast(device, enabled=False):
            network = self.network(dtype)
            chunks = [
                run(network, chunk.contiguous(memory_format=torch.channels_last)) for chunk in pixel_values.split(size)
            ]
        return [torch.cat(level) for level in zip(*chunks, strict=True)]

    def network(self, dtype: torch.dtype) -> nn.Module:
        """The folded copy in ``dtype``, made anew when the backbone's weights have changed."""
        state = [*self.backbone.parameters(), *self.backbone.buffers()]
        made_from = (dtype, *((x.data_ptr(), x._version, x.dtype, x.device) for x in state))
        if self._folded is None or made_from != self._made_from:
            self._folded, self._made_from = fold(self.backbone, self.side).to(dtype), made_from
        return self._folded


def run(network: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """The network's maps as a list."""
    maps = network(pixel_values)
    return list(maps if isinstance(maps, list | tuple) else maps.feature_maps)


@torch.no_grad()
def fold(backbone: nn.Module, side: int = 64) -> nn.Module:
    """A copy of ``backbone`` in evaluation mode, channels last, its batch norms in the convolutions before them."""
    folded = copy.deepcopy(backbone).eval().requires_grad_(False)
    weight = next(folded.parameters())
    probe = (
        torch.linspace(-2, 2, 3 * side * side, dtype=weight.dtype, device=weight.device).sin().view(1, 3, side, side)
    )
    expected = run(folded, probe)
    for convolution, norm_name in conv_norm_pairs(folded, probe).items():
        norm: Any = folded.get_submodule(norm_name)
        scale = norm.weight * torch.rsqrt(norm.running_var + getattr(norm, "eps", 1e-5))
        shift = norm.bias - norm.running_mean * scale
        bias = convolution.bias if convolution.bias is not None else torch.zeros_like(shift)
        convolution.weight.copy_(convolution.weight * scale[:, None, None, None])
        convolution.bias = nn.Parameter(bias * scale + shift, requires_grad=False)
        # timm's batch norms carry the activation that follows them.
        parent, _, name = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), name, getattr(norm, "act", nn.Identity()))
    if not all(
        torch.allclose(x, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
        for x, y in zip(run(folded, probe), expected, strict=True)
    ):
        folded = copy.deepcopy(backbone).eval().requires_grad_(False)
    return folded.to(memory_format=torch.channels_last)


class PackedConv2d(nn.Module):
    """A convolution that keeps its weights in the blocked layout oneDNN computes with, which depends on the input's
    shape: else they are brought into it at every call.

    Args:
        convolution: frozen; its weights are kept, too.
    """

    kept = 2
    """Shapes for which weights are kept: those of the crops, and of the last views."""

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        weight = self._packed.pop(x.shape, None)
        if weight is None:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, x.shape)
        self._packed[x.shape] = weight  # the last used is the last in order
        while len(self._packed) > self.kept:
            self._packed.pop(next(iter(self._packed)))
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, "none", [], "")


def pack(network: nn.Module) -> None:
    """Replace the convolutions by :class:`PackedConv2d` where this build of PyTorch has what it needs."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Conv2d and child.padding_mode == "zeros" and not isinstance(child.padding, str):
                setattr(parent, name, PackedConv2d(child))


def conv_norm_pairs(network: nn.Module, probe: Tensor) -> dict[nn.Conv2d, str]:
    """Every convolution whose output a batch norm, by its name, takes in as it is, seen in one forward pass."""
    producers: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.Conv2d, str] = {}
    hooks = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        producers[id(output)] = (module, output)  # type: ignore[assignment]  # the reference keeps the id unique

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(remember))
        elif getattr(module, "running_mean", None) is not None and getattr(module, "weight", None) is not None:

            def pair(module: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if id(inputs[0]) in producers:
                    pairs[producers[id(inputs[0])][0]] = name

            hooks.append(module.register_forward_pre_hook(pair))
    try:
        run(network, probe)
    finally:
        for hook in hooks:
            hook.remove()
    return pairs
