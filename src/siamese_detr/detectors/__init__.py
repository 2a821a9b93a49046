"""Stock Hugging Face detectors behind one small interface."""

from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, DetectorSize, Memory
from siamese_detr.detectors.backbones import Backbone, resolve_backbone
from siamese_detr.detectors.build import FAMILIES, build_detector, plan_detector
from siamese_detr.detectors.loading import LoadReport, load_detector

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
