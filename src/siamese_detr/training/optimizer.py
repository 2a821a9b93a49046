"""AdamW's parameter groups and the learning rate's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

DROP = 0.1
"""What a dropped learning rate is multiplied by."""


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay is meant for: the weights of linear and convolutional layers.

    Norms, biases and embeddings (object queries, levels) are scales and positions: pulling them to zero is no prior.
    """
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear))
        for name, _ in module.named_parameters(recurse=False)
        if name == "weight"
    }


def adamw(model: nn.Module, lr: float, weight_decay: float, decay_all: bool = False) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with and without weight decay.

    Args:
        model: frozen parameters (``requires_grad`` False) are left out.
        lr: learning rate.
        weight_decay: of the decayed group.
        decay_all: decay norms, biases and embeddings too, as the papers' code does.
    """
    decayed = decayed_names(model)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    with_decay = [parameter for name, parameter in trainable if decay_all or name in decayed]
    without = [parameter for name, parameter in trainable if not (decay_all or name in decayed)]
    groups = [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def lr_factor(schedule: str, steps: int, drop_at: float = 2 / 3, warmup: int = 0) -> Callable[[int], float]:
    """What the learning rate is multiplied by at step 0, 1, … of ``steps``.

    Args:
        schedule: ``step`` (x 0.1 from the share ``drop_at`` of the run on, as the papers), ``constant``, ``cosine`` (to
            zero), or ``one-cycle`` (cosine up from 1/25 over 30 % of the run, then cosine to 1/10,000).
        steps: of the whole run.
        drop_at: share of the run, 0 to 1; ``step`` only.
        warmup: steps over which the rate first grows linearly (not ``one-cycle``).
    """
    drop = round(drop_at * steps)

    def cosine(start: float, end: float, share: float) -> float:
        return end + (start - end) * (1 + math.cos(math.pi * min(max(share, 0.0), 1.0))) / 2

    def factor(step: int) -> float:
        if schedule == "one-cycle":
            up = 0.3 * steps
            if step < up:
                return cosine(1 / 25, 1.0, step / up)
            return cosine(1.0, 1e-4, (step - up) / max(steps - up, 1))
        ramp = min(1.0, (step + 1) / (warmup + 1))
        if schedule == "cosine":
            return ramp * cosine(1.0, 0.0, (step - warmup) / max(steps - warmup, 1))
        return ramp * (DROP if schedule == "step" and step >= drop else 1.0)

    return factor
