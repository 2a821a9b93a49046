"""Stock Hugging Face detectors behind one small interface."""

from .adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from .backbones import Backbone, resolve_backbone
from .build import FAMILIES, LoadReport, build_detector, load_detector, plan_detector

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
]
