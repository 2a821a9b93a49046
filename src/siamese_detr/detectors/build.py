"""Build a new detector of a family."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig

from siamese_detr import plugins
from siamese_detr.config import nearest
from siamese_detr.detectors.adapter import DetectorAdapter, DetectorSize
from siamese_detr.detectors.backbones import Backbone, resolve_backbone
from siamese_detr.errors import UserError

FAMILIES = {
    "detr": "detr:DetrAdapter",
    "conditional-detr": "conditional_detr:ConditionalDetrAdapter",
    "deformable-detr": "deformable_detr:DeformableDetrAdapter",
    "dab-detr": "dab_detr:DabDetrAdapter",
    "rt-detr": "rt_detr:RTDetrAdapter",
    "rt-detr-v2": "rt_detr:RTDetrV2Adapter",
    "d-fine": "rt_detr:DFineAdapter",
    "deimv2": "deimv2:Deimv2Adapter",
    "lw-detr": "lw_detr:LwDetrAdapter",
    "rf-detr": "lw_detr:RfDetrAdapter",
}
"""Family -> where its adapter is (imported when asked for)."""
PLUGINS = "siamese_detr.detectors"
"""Entry points of other packages that add a family: `family = "module:Adapter"`."""


def families() -> list[str]:
    """All families there are, those of other installed packages included (imports these packages)."""
    return [*FAMILIES, *plugins.load(PLUGINS)]


def adapter_class(family: str) -> type[DetectorAdapter]:
    """The adapter of a family.

    Raises:
        UserError: no such family.
    """
    if family in FAMILIES:
        module, name = FAMILIES[family].split(":")
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)
    adapter = plugins.load(PLUGINS).get(family)
    if adapter is None:
        raise UserError(f"unknown detector {family!r}{nearest(family, families())}; there are: {', '.join(families())}")
    if not (isinstance(adapter, type) and issubclass(adapter, DetectorAdapter) and adapter.family == family):
        raise UserError(f"the plug-in for {family!r} detectors is no DetectorAdapter whose `family` is {family!r}")
    return adapter


@dataclass(frozen=True)
class DetectorPlan:
    """A detector that can be built: everything about it is known and fits together."""

    adapter: type[DetectorAdapter]
    size: DetectorSize
    backbone: Backbone
    backbone_config: PretrainedConfig
    config: PretrainedConfig


def plan_detector(
    family: str = "conditional-detr",
    backbone: str | PretrainedConfig = "efficientnet-lite0",
    **sizes: Any,
) -> DetectorPlan:
    """What :func:`build_detector` would build, without building it: mistakes show in a fraction of a second.

    Raises:
        UserError: unknown family, backbone or option; sizes that do not fit together.
    """
    adapter = adapter_class(family)
    fields = {field.name for field in dataclasses.fields(DetectorSize)}
    options = {name: value for name, value in sizes.items() if name not in fields}
    given = {name: value for name, value in sizes.items() if name in fields and value is not None}
    own = inspect.signature(adapter.configure).parameters
    if unknown := [name for name in options if name not in own]:
        raise UserError(f"a {family!r} detector has no option {unknown[0]!r}{nearest(unknown[0], [*fields, *own])}")
    size = DetectorSize(**{**adapter.defaults, **given})
    if size.hidden_size % (2 * size.heads):
        raise UserError(f"hidden_size {size.hidden_size} must be a multiple of 2 x heads (2 x {size.heads})")
    resolved = resolve_backbone(backbone)
    backbone_config = adapter.backbone_config(resolved, adapter.wanted_strides(**options), size.dilation)
    return DetectorPlan(adapter, size, resolved, backbone_config, adapter.configure(backbone_config, size, **options))


def build_detector(
    family: str = "conditional-detr",
    backbone: str | PretrainedConfig = "efficientnet-lite0",
    *,
    class_names: list[str] | None = None,
    seed: int | None = None,
    **sizes: Any,
) -> DetectorAdapter:
    """A new detector, initialised as its paper does, with a frozen backbone.

    Args:
        family: see `FAMILIES`.
        backbone: see `resolve_backbone`.
        class_names: names of the classes; their number is the class head's size (else `num_labels`, 1).
        seed: makes the initial values reproducible, without touching PyTorch's global random state.
        **sizes: fields of `DetectorSize`, and options of the family.

    Raises:
        UserError: unknown family, backbone or option; sizes that do not fit together.
    """
    if class_names is not None:
        sizes["num_labels"] = len(class_names)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        plan = plan_detector(family, backbone, **sizes)
        model = plan.adapter.model_class(plan.config)
        provenance = {"family": family, "backbone": plan.backbone.name}
        detector = plan.adapter(model, plan.backbone.image_mean, plan.backbone.image_std, provenance)
        detector.initialise()
        plan.backbone.load_into(detector.backbone, plan.backbone_config)
    labels = plan.size.num_labels
    names = class_names or (["object"] if labels == 1 else [f"class {i}" for i in range(labels)])
    detector.name_classes(names)
    return detector.train()
