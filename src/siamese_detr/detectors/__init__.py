"""Stock Hugging Face detectors behind one small interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
    from siamese_detr.detectors.backbones import Backbone, resolve_backbone
    from siamese_detr.detectors.build import FAMILIES, build_detector, plan_detector
    from siamese_detr.detectors.loading import LoadReport, load_detector
    from siamese_detr.detectors.research.checkpoint import save_research_checkpoint

__all__ = [
    "FAMILIES",
    "Backbone",
    "Decoded",
    "DetectorAdapter",
    "DetectorSize",
    "LoadReport",
    "Memory",
    "build_detector",
    "load_detector",
    "plan_detector",
    "resolve_backbone",
    "save_research_checkpoint",
]

_MODULES = {
    "FAMILIES": "build",
    "Backbone": "backbones",
    "LoadReport": "loading",
    "build_detector": "build",
    "load_detector": "loading",
    "plan_detector": "build",
    "resolve_backbone": "backbones",
    "save_research_checkpoint": "research.checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: the options of a detector do not need PyTorch, which takes seconds to load.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'adapter')}"), name)
