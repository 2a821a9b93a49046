"""Heads that exist only during pre-training and are thrown away with it. The box head is the detector's own: it is what
transfers.

Linear layers keep PyTorch's initialisation, as in the papers' heads.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def class_head(hidden_size: int) -> nn.Linear:
    """Scores of {unused, object, no-object} for a decoder state."""
    return nn.Linear(hidden_size, 3)


class FeatureHead(nn.Sequential):
    """MLP2: decoder state (..., hidden) to a feature of the frozen backbone (..., channels)."""

    def __init__(self, hidden_size: int, channels: int) -> None:
        super().__init__(nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, channels))


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too: the sum enters the loss of every process."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over (B, D) whose statistics span all processes, on any device and for any share of the batch per
    process.

    (``nn.SyncBatchNorm`` refuses CPU tensors.) With one process it is ``nn.BatchNorm1d``, in at least float32. A batch
    of one sample is normalised to the bias instead of raising an error.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if not self.training:
                return super().forward(x)
            return self._normalise(x)

    def _normalise(self, x: Tensor) -> Tensor:
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        total = torch.cat([x.sum(0), x.new_full((1,), x.shape[0])])
        if processes > 1:
            total = _SumOverProcesses.apply(total)
        samples = total[-1].detach()
        mean = total[:-1] / samples
        centred = x - mean
        square = centred.square().sum(0)
        if processes > 1:
            square = _SumOverProcesses.apply(square)
        variance = square / samples
        if self.track_running_stats:
            with torch.no_grad():
                momentum = self.momentum if self.momentum is not None else 0.1
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)  # type: ignore[union-attr]
                unbiased = square / (samples - 1).clamp(min=1)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)  # type: ignore[union-attr]
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias


class GlobalHead(nn.Module):
    """Projector h (three layers) and predictor g (two) of global discrimination (paper §3.3; SimSiam).

    Args:
        in_size: channels of the pooled encoder output (hidden size times levels).
        hidden_size: width of the projector's inner layers.
        out_size: width of projection and prediction.
        predictor_size: width of the predictor's inner layer.
    """

    def __init__(self, in_size: int, hidden_size: int = 256, out_size: int = 256, predictor_size: int = 256) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(in_size, hidden_size),
            BatchNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            BatchNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, out_size),
            BatchNorm(out_size),
        )
        self.predictor = nn.Sequential(
            nn.Linear(out_size, predictor_size),
            BatchNorm(predictor_size),
            nn.ReLU(),
            nn.Linear(predictor_size, out_size),
        )

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled encoder output (V, B, in_size) to predictions and projections, each (V, B, out_size).

        Every view passes on its own, so that batch norm normalises it by its own statistics (view 1 first, as in the
        paper).
        """
        projections = torch.stack([self.projector(view) for view in pooled])
        return torch.stack([self.predictor(view) for view in projections]), projections
