"""Convolutions that compute the sums and activations after them, and the graph of a frozen network with them in it."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn


class ConvolutionTracer(fx.Tracer):
    """Does not look into convolutions that pad by the size of their input, as TensorFlow does."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` is called as it is."""
        return isinstance(m, nn.Conv2d) or super().is_leaf_module(m, module_qualified_name)


ACTIVATIONS: dict[type, tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
}
"""Names and arguments in oneDNN."""


class CudnnConv2d(nn.Module):
    """A convolution, the sum with another tensor, and ReLU in one pass over the memory of a CUDA device.

    Args:
        convolution: frozen, padding with zeros; not changed.
        activation: that of ReLU.
        in_place: makes no difference.
    """

    activations: ClassVar = {nn.ReLU: ACTIVATIONS[nn.ReLU]}
    needs_activation = True
    """Without one, cuDNN has nothing for it."""

    def __init__(
        self, convolution: nn.Conv2d, activation: tuple[str, list[float]] | None, in_place: bool = False
    ) -> None:
        super().__init__()
        self.geometry: Any = (convolution.stride, convolution.padding, convolution.dilation, convolution.groups)
        self.weight, self.bias = convolution.weight.detach(), convolution.bias
        self.blocks = Blocks(convolution) if Blocks.suit(convolution) else None
        if self.blocks is not None:
            self.geometry, self.weight = ((1, 1), (0, 0), (1, 1), 1), self.blocks.weight(self.weight)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """ReLU of the convolution of ``x`` (B, C, H, W) plus ``other``, which has the result's shape."""
        x = x if self.blocks is None else self.blocks.image(x)
        if other is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *self.geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, other, 1.0, self.bias, *self.geometry)


class Blocks:
    """A convolution of stride 2 over few channels as one of stride 1 over the four times as many of 2x2 pixels.

    Args:
        convolution: a network's first one.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        self.kernel, self.padding = convolution.kernel_size[0], int(convolution.padding[0])
        self.first = -self.padding // 2  # of the blocks that the first output looks at
        self.blocks = (self.kernel - 1 - self.padding) // 2 - self.first + 1
        self.filled = -4 * convolution.in_channels % 8  # tensor cores do multiples of 8 channels well

    @staticmethod
    def suit(convolution: nn.Conv2d) -> bool:
        """Whether ``convolution`` can be computed so, and gains by it."""
        return (
            convolution.in_channels <= 4
            and convolution.groups == 1
            and convolution.stride == (2, 2)
            and convolution.dilation == (1, 1)
            and len({*convolution.kernel_size}) == len({*convolution.padding}) == 1
        )

    def weight(self, weight: Tensor) -> Tensor:
        """(O, C, k, k) -> (O, 4 C and zeros, blocks, blocks), channels last."""
        before = -self.padding - 2 * self.first
        after = 2 * self.blocks - before - self.kernel
        return self._arranged(nn.functional.pad(weight, (before, after, before, after)))

    def image(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 C and zeros, height, width), channels last, with the blocks of zeros around."""
        outputs = ((side + 2 * self.padding - self.kernel) // 2 + 1 for side in x.shape[2:])
        height, width = (size + self.blocks - 1 for size in outputs)
        before = -2 * self.first
        below, right = (2 * size - before - side for size, side in zip((height, width), x.shape[2:], strict=True))
        return self._arranged(nn.functional.pad(x, (before, right, before, below)))

    def _arranged(self, x: Tensor) -> Tensor:
        blocks = nn.functional.pad(nn.functional.pixel_unshuffle(x, 2), (0, 0, 0, 0, 0, self.filled))
        return blocks.contiguous(memory_format=torch.channels_last)


class FusedConv2d(nn.Module):
    """A convolution, the sum with another tensor, and an activation in one pass over memory.

    oneDNN computes with weights in a blocked layout that depends on the input's shape. It is kept here; else the
    weights are brought into it at every call. Shapes with the same layout share it. The plain weights, which any
    layout gives back exactly, are not kept.

    Args:
        convolution: frozen, padding with zeros; not changed.
        activation: one of ``ACTIVATIONS``, after a sum only ReLU; None: none.
        in_place: write the sum to where the other summand is.
    """

    activations: ClassVar = ACTIVATIONS
    needs_activation = False
    kept = 4
    """Input shapes for which weights are kept: chunks of the views and of the crops, and the last, smaller ones."""

    def __init__(
        self, convolution: nn.Conv2d, activation: tuple[str, list[float]] | None = None, in_place: bool = False
    ) -> None:
        super().__init__()
        self._plain: Tensor | None = convolution.weight.detach()
        self.bias = convolution.bias
        self.geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self.activation, self.in_place = activation, in_place
        self._packed: dict[torch.Size, Tensor] = {}

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """Activation of the convolution of ``x`` (B, C, H, W) plus ``other``, which has the result's shape."""
        mkldnn = torch.ops.mkldnn
        weight = self._packed.pop(x.shape, None)
        if weight is None:
            weight = mkldnn._reorder_convolution_weight(self.plain(), *self.geometry, x.shape)
            layout = mkldnn._get_mkldnn_serialized_md
            equal = (w for w in self._packed.values() if torch.equal(layout(w), layout(weight)))
            weight, self._plain = next(equal, weight), None
        self._packed[x.shape] = weight  # the last used is the last in order
        while len(self._packed) > self.kept:
            self._packed.pop(next(iter(self._packed)))
        if other is None:
            name, arguments = self.activation or ("none", [])
            return mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, name, arguments, "")
        options = (weight, self.bias, *self.geometry, "add", 1.0, *(self.activation or (None, [])), "")
        if self.in_place:
            return mkldnn._convolution_pointwise_(other, x, *options)
        return mkldnn._convolution_pointwise(x, other, *options)

    def plain(self) -> Tensor:
        """The weights (C_out, C_in / groups, h, w) in PyTorch's layout."""
        return self._plain if self._plain is not None else next(iter(self._packed.values())).to_dense()

    def forget_shapes(self) -> None:
        """Keep the plain weights and no layout of a shape."""
        self._plain, self._packed = self.plain(), {}


def drop_identities(network: fx.GraphModule) -> None:
    """Take out what does nothing in evaluation mode: what is left of batch norms, and dropouts."""
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(network.get_submodule(node.target), nn.Identity | nn.Dropout):
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)


def fuse_convolutions(network: fx.GraphModule, fused: type[FusedConv2d] | type[CudnnConv2d] = FusedConv2d) -> None:
    """Put ``fused`` for convolutions and for the sums and activations that alone use their results."""
    graph = network.graph
    order = {node: n for n, node in enumerate(graph.nodes)}  # of execution

    def module(node: fx.Node | None) -> Any:
        return network.get_submodule(str(node.target)) if node is not None and node.op == "call_module" else None

    def only_user(node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    # Tensors made by convolutions, so ours to write to.
    fresh = {node for node in graph.nodes if type(module(node)) is nn.Conv2d}
    for number, node in enumerate(list(graph.nodes)):
        convolution = module(node)
        if type(convolution) is not nn.Conv2d or convolution.padding_mode != "zeros":
            continue
        if isinstance(convolution.padding, str):
            continue
        replaced, other = [node], None
        after = only_user(node)
        if after is not None and after.target in (operator.add, operator.iadd):
            summands = [x for x in after.args if x is not node]
            if len(summands) == 1 and isinstance(summands[0], fx.Node):
                other = summands[0]
                replaced.append(after)
                after = only_user(after)
        activation = fused.activations.get(type(module(after)))
        if activation is not None and after is not None and (other is None or activation[0] == "relu"):
            replaced.append(after)
        else:
            activation = None
        if activation is None and fused.needs_activation:
            continue
        # Whatever else reads the other summand must have done so before. Later readers of a view of it are not seen
        # here, but their numbers are wrong then, and whoever compares them keeps the network as it was.
        readers = set() if other is None else other.users.keys() - set(replaced)
        over = other in fresh and other is not node.args[0]
        in_place = over and all(order[reader] < order[node] for reader in readers)
        name = f"fused_{number}"
        network.add_submodule(name, fused(convolution, activation, in_place))
        with graph.inserting_after(replaced[-1]):
            made = graph.call_module(name, (node.args[0],) if other is None else (node.args[0], other))
        order[made] = order[replaced[-1]]
        fresh.add(made)
        replaced[-1].replace_all_uses_with(made)
        for old in reversed(replaced):
            graph.erase_node(old)
    network.delete_all_unused_submodules()
    network.recompile()
