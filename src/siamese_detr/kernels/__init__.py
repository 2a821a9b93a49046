"""Whatever only makes detectors faster: kernels for operations that are defined elsewhere, exchanged in one place.

Nothing below this package knows that it exists. :func:`accelerate` exchanges modules of a detector for faster ones that
compute the same, and registers kernels on the operations ``siamese_detr::deformable_sample``,
``siamese_detr::assign`` (detection) and ``siamese_detr::augment`` (views). :func:`stock` puts the modules back.
"""

from __future__ import annotations

import importlib
import os
from typing import Literal

import torch
from torch import nn

from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.kernels.sampling import Sampling
from siamese_detr.runtime.gpu import runs_triton

Mode = Literal["auto", "off", "hub"]
ENVIRONMENT = "SIAMESE_DETR_KERNELS"
"""Set to ``off``, this variable exchanges nothing, whatever was asked for."""
STOCK_SAMPLING = "MultiScaleDeformableAttention"
"""Transformers' class of deformable attention's sampling, of which each family that has it holds an equal copy."""


def accelerate(model: nn.Module, device: torch.device | str, mode: Mode = "auto") -> list[str]:
    """Exchange parts of the detectors in ``model`` for faster ones that compute the same.

    Args:
        model: a detector, its adapter, or what holds one.
        device: on which it is going to compute.
        mode: ``auto``: kernels of this package; ``off``: none; ``hub``: also kernels that Transformers loads from the
            Hugging Face hub, which go first.

    Returns:
        names of what was exchanged, for people.

    Raises:
        UserError: ``hub``, and the package for it is missing or a kernel cannot be loaded.
    """
    device = torch.device(device)
    if mode == "off" or os.environ.get(ENVIRONMENT) == "off":
        return []
    exchanged: list[str] = []
    if mode == "hub":
        from siamese_detr.kernels.hub import use_kernels

        exchanged += use_kernels(model)
    triton = runs_triton(device)
    if triton:
        for name in ("gpu_assign", "gpu_photometric"):
            importlib.import_module(f"siamese_detr.kernels.{name}")
        exchanged += ["matching", "augmentation"]
    if (device.type == "cpu" or triton) and _exchange_sampling(model):
        # Imported when needed: Numba takes a moment, and Triton is missing on some systems.
        importlib.import_module(f"siamese_detr.kernels.{'gpu' if triton else 'cpu'}_sampling")
        exchanged.append("deformable sampling")
    for part in model.modules():
        if isinstance(part, DetectorAdapter):
            from siamese_detr.kernels.frozen import FrozenBackbone

            part.frozen_backbone = FrozenBackbone(part.backbone, part.square_side or 64)
            exchanged.append("frozen backbone")
            if device.type == "cpu" and part.backbone_trainable:
                part.backbone.to(memory_format=torch.channels_last)  # its convolutions are faster so
    return exchanged


def stock(model: nn.Module) -> None:
    """Undo the exchanges of :func:`accelerate`, but for kernels of the hub."""
    for parent, name, child in _children(model):
        if isinstance(child, Sampling):
            setattr(parent, name, child.stock)
    for part in model.modules():
        if isinstance(part, DetectorAdapter):
            part.frozen_backbone = None


def _exchange_sampling(model: nn.Module) -> bool:
    from siamese_detr.kernels.hub import has_kernel

    places = [
        (parent, name, child)
        for parent, name, child in _children(model)
        if type(child).__name__ == STOCK_SAMPLING and not isinstance(parent, Sampling) and not has_kernel(child)
    ]
    for parent, name, child in places:
        setattr(parent, name, Sampling(child))
    return bool(places)


def _children(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    return [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
