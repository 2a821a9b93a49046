"""Find where a non-finite number comes from: watch every module's output and every operation's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def watch(model: nn.Module) -> Iterator[list[str]]:
    """Within, the list fills with the modules whose output was not finite, in the order of the forward pass; the
    backward pass raises ``RuntimeError`` naming the operation whose gradient is NaN. Slow.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in tensors(output)):
                source = "from finite inputs" if all(bool(t.isfinite().all()) for t in tensors(inputs)) else "passed on"
                found.append(f"{name or 'the whole model'} ({type(module).__name__}, {source})")

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))
