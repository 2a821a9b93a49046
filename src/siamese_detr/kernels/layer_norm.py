"""Layer norms trained on a CPU: what they give is kept for the backward pass, and not what they were given.

The next layer keeps it anyway, while nothing else keeps the sum of tokens and a branch, of which DETR's relatives take
the norm. Its normalised values are ``(out - bias) / weight``. Under autocast, compiled, and with weights near zero,
everything is PyTorch's own. (On a GPU, see :mod:`.gpu_layers`.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from siamese_detr.detectors.functional import observed, retype
from siamese_detr.kernels.dropout import residual
from siamese_detr.runtime.gpu import runs_kernels

SMALLEST = 2.0**-10
"""Weights with smaller ones among them, or so much smaller than a bias, are not divided by: rounding would show."""


class LayerNorm(nn.LayerNorm):
    """A stock layer norm in all but what it keeps while it is trained: what it gives is not to be changed in place, nor
    differentiated twice."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        if not self.training or torch.compiler.is_compiling():
            return super().forward(input)
        if runs_kernels(input):
            from siamese_detr.kernels import gpu_layers

            if gpu_layers.suits(self, input):
                return gpu_layers.add_norm(self, input)
        elif torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and self._reversible(input):
            return _LayerNorm.apply(input, self.weight, self.bias, self.eps)
        return super().forward(input)

    def _reversible(self, x: Tensor) -> bool:
        weight, bias = self.weight, self.bias
        fits = (
            x.device.type == "cpu"
            and bias is not None  # so there are weights, too
            and x.dtype == weight.dtype == bias.dtype
            and x.dtype in (torch.float32, torch.float64)
            and x.shape[-1:] == weight.shape
        )
        if not fits:
            return False
        least, most = np.abs(weight.detach().numpy()).min(), np.abs(bias.detach().numpy()).max()
        return bool(least >= SMALLEST * max(1, most))


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out, _, per_deviation = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.save_for_backward(out, weight, bias, per_deviation)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out, weight, bias, per_deviation = ctx.saved_tensors
        normal = torch.addcmul(-bias / weight, out, 1 / weight)
        moments = torch.zeros_like(per_deviation), torch.ones_like(per_deviation)
        to_x, *others = torch.ops.aten.native_layer_norm_backward(
            gradient, normal, weight.shape, *moments, weight, bias, ctx.needs_input_grad[:3]
        )
        return None if to_x is None else to_x.mul_(per_deviation), *others, None


def add_norm(norm: nn.Module, x: Tensor, branch: Tensor, probability: float, training: bool) -> Tensor:
    """``norm(x + dropout(branch))``, of one shape; nothing is dropped but in training."""
    if isinstance(norm, LayerNorm) and training and runs_kernels(x) and not torch.compiler.is_compiling():
        from siamese_detr.kernels import gpu_layers

        if gpu_layers.suits(norm, x, branch) and probability < 1:
            return observed(norm, (x, branch), gpu_layers.add_norm(norm, x, branch, probability))
    return norm(residual(x, branch, probability, training))


def install(model: nn.Module) -> None:
    """Let the stock layer norms of a model do so. Names, weights and what is saved stay as they are."""
    retype(model, nn.LayerNorm, LayerNorm)


def uninstall(model: nn.Module) -> None:
    """Make them stock ones again."""
    retype(model, LayerNorm, nn.LayerNorm)
