"""AdamW's parameter groups and the learning rate's schedules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from siamese_detr.config import Options, check_numbers
from siamese_detr.errors import UserError

if TYPE_CHECKING:  # loads PyTorch, for which --help need not wait
    import torch
    from torch import nn

DROP = 0.1
"""What a dropped learning rate is multiplied by."""
GEOMETRY = ("sampling_offsets", "reference_points")
"""Parameters that say where deformable attention looks: a small change moves it far (Deformable DETR, section 5)."""
GEOMETRY_RATE = 0.1
"""Their share of the learning rate."""


@dataclass(kw_only=True)
class OptimizerConfig(Options):
    """AdamW and the learning rate's schedule.

    Args:
        lr: learning rate; a tenth of it for the geometry of deformable attention.
        weight_decay: of linear and convolutional weights.
        decay_all: decay norms, biases and embeddings too, as the papers' code does.
        clip: largest gradient norm (0: no clipping).
        schedule: step (x 0.1 at DROP_AT), constant, cosine or one-cycle.
        drop_at: share of the run after which the rate drops, 0 to 1; step only.
        warmup: updates over which the rate grows linearly; not one-cycle.
    """

    lr: float = 1e-4
    weight_decay: float = 1e-4
    decay_all: bool = False
    clip: float = 0.1
    schedule: Literal["step", "constant", "cosine", "one-cycle"] = "step"
    drop_at: float = 2 / 3
    warmup: int = 0

    def check(self) -> None:
        """Raise :class:`UserError`, naming the setting, for numbers out of their range."""
        check_numbers(self, not_negative=("lr", "weight_decay", "clip", "warmup"), shares=("drop_at",))

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.schedule != "step":
            yield ("drop_at",), f"schedule is {self.schedule}"
        if self.schedule == "one-cycle":
            yield ("warmup",), "one-cycle has a warm-up of its own"


def decayed_names(model: nn.Module) -> set[str]:
    """Parameters that weight decay is meant for: the weights of linear and convolutional layers.

    Norms, biases and embeddings (object queries, levels) are scales and positions: pulling them to zero is no prior.
    """
    from torch import nn

    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear))
        for name, _ in module.named_parameters(recurse=False)
        if name == "weight"
    }


def layer_rates(backbone: nn.Module, decay: float) -> dict[int, float]:
    """Layer-wise learning-rate decay of a vision transformer (BEiT, Bao et al. 2022): the last block learns at
    ``decay`` times the backbone's rate, the one before at its square, ..., and what precedes the blocks slowest.

    Args:
        backbone: with a list of attention blocks.
        decay: above 0 to 1.

    Returns:
        id of the parameter -> its share of the backbone's rate.

    Raises:
        UserError: the backbone has no such blocks.
    """
    named = dict(backbone.named_parameters())
    blocks = {name: re.fullmatch(r"(\D*\b(?:layers?|blocks))\.(\d+)\..*", name) for name in named}
    (prefix, *_) = [match[1] for name, match in blocks.items() if match and "att" in name[match.end(2) :]] or [None]
    numbers = {name: int(match[2]) for name, match in blocks.items() if match and match[1] == prefix}
    if not numbers:
        raise UserError("layer_decay: this backbone has no attention blocks, as vision transformers do; leave it out")
    depth, first = max(numbers.values()) + 1, min(list(named).index(name) for name in numbers)
    powers = {name: depth + 1 if n < first else 0 for n, name in enumerate(named)}  # before the blocks, and after
    powers |= {name: depth - number for name, number in numbers.items()}
    return {id(parameter): decay ** powers[name] for name, parameter in named.items()}


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    decay_all: bool = False,
    backbone: nn.Module | None = None,
    backbone_lr: float = 0.0,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with and without weight decay, each part at its own rate.

    Args:
        model: frozen parameters (``requires_grad`` False) are left out.
        lr: learning rate; a tenth of it for the geometry of deformable attention.
        weight_decay: of the decayed parameters.
        decay_all: decay norms, biases and embeddings too, as the papers' code does.
        backbone: the part of ``model`` that learns at ``backbone_lr``.
        backbone_lr: its learning rate.
        layer_decay: see :func:`layer_rates`; 1: all of the backbone learns alike.
    """
    import torch

    decayed = decayed_names(model)
    inside = {} if backbone is None else {id(parameter): 1.0 for parameter in backbone.parameters()}
    if backbone is not None and layer_decay < 1:
        inside = layer_rates(backbone, layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slow = any(part in name for part in GEOMETRY)
            rate = lr * (GEOMETRY_RATE if slow else 1.0)
            if id(parameter) in inside:
                rate = backbone_lr * inside[id(parameter)]
            decay = weight_decay if decay_all or name in decayed else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "lr": rate, "weight_decay": decay} for (rate, decay), members in groups.items()],
        lr=lr,
        fused=True,
    )


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
