"""Stock Hugging Face detectors behind one small interface."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import DetectorAdapter
    from siamese_detr.detectors.backbones import resolve_backbone
    from siamese_detr.detectors.build import FAMILIES, build_detector, plan_detector
    from siamese_detr.detectors.loading import load_detector
    from siamese_detr.detectors.research.checkpoint import save_research_checkpoint

__all__ = [
    "FAMILIES",
    "DetectorAdapter",
    "build_detector",
    "load_detector",
    "plan_detector",
    "resolve_backbone",
    "save_research_checkpoint",
]
_MODULES = {
    "FAMILIES": "build",
    "DetectorAdapter": "adapter",
    "build_detector": "build",
    "load_detector": "loading",
    "plan_detector": "build",
    "resolve_backbone": "backbones",
    "save_research_checkpoint": "research.checkpoint",
}


def __getattr__(name: str) -> Any:
    # Imported on demand: the options of a detector do not need PyTorch, which takes seconds to load.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
