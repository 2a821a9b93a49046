"""Linear layers trained on an AMD processor with AVX-512: computed by oneDNN, which there is faster than MKL. (In half
precision on a GPU, see :mod:`.gpu_linear`.)

MKL, with which PyTorch multiplies matrices of single precision, is Intel's. Its products reach three fifths to four
fifths of such a processor's rate, oneDNN's nine tenths, in the forward pass and for the gradient of the input.
Everywhere else, and for small products, which the detour through Python would slow down, all is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from siamese_detr.detectors.functional import product_dtype, retype
from siamese_detr.runtime.gpu import runs_kernels
from siamese_detr.runtime.hardware import prefers_onednn

SMALLEST = 1 << 25
"""Multiplications of a product from which on oneDNN saves more time than calling it takes."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` of tensors without a gradient, always a new tensor.

    Args:
        x: (..., D).
        weight: (H, D), of any strides.
        bias: (H,).
    """
    if _pays(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


class Linear(nn.Linear):
    """A stock linear layer in all but how it computes while it is trained."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., H)."""
        if not self.training or torch.compiler.is_compiling():
            return super().forward(input)
        if runs_kernels(input):
            from siamese_detr.kernels import gpu_linear

            half = torch.is_autocast_enabled(input.device.type)
            if half and gpu_linear.suits(input, self.weight, self.bias, dtype := product_dtype(input)):
                return gpu_linear.linear(input, self.weight, self.bias, dtype)
        elif not torch.is_autocast_enabled("cpu") and _pays(input, self.weight):
            return _Linear.apply(input, self.weight, self.bias)
        return super().forward(input)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        above = gradient.reshape(-1, gradient.shape[-1])
        return (
            product(gradient, weight.t()) if to_x else None,
            above.t() @ x.reshape(-1, x.shape[-1]) if to_weight else None,  # MKL's is the faster one here
            above.sum(0) if to_bias else None,
        )


def _pays(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * len(weight) >= SMALLEST
        and prefers_onednn()
    )


def install(model: nn.Module) -> None:
    """Let the stock linear layers of a model compute this way. Names, weights and what is saved stay as they are."""
    retype(model, nn.Linear, Linear)


def uninstall(model: nn.Module) -> None:
    """Make them stock ones again."""
    retype(model, Linear, nn.Linear)
