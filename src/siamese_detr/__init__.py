"""Pre-train DETR-family object detectors on unlabelled images, fine-tune them with few labels.

The verbs are functions of this package and commands of ``siamese-detr``, with the same arguments::

    import siamese_detr

    siamese_detr.pretrain(images="photos", out="runs/pretrained")
    siamese_detr.finetune(train="train.json", val="val.json", model="runs/pretrained", out="runs/detector")

``help(siamese_detr.pretrain)`` explains the arguments.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# Read by OpenMP when PyTorch is loaded, and inherited by data workers: a thread that waits for another sleeps instead
# of keeping a core busy, which on a shared machine costs the others (and this run) most of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from siamese_detr.comparison.compare import compare
    from siamese_detr.demonstration import demo
    from siamese_detr.evaluation.evaluate import evaluate
    from siamese_detr.evaluation.predict import predict
    from siamese_detr.images.check import check
    from siamese_detr.interchange.export import export
    from siamese_detr.proposals.propose import propose
    from siamese_detr.reporting.report import report
    from siamese_detr.training.finetune import finetune
    from siamese_detr.training.pretrain import pretrain

__version__ = "0.1.0"

# Where each verb lives. Imported only when asked for: a command's start-up must not pay for the others.
VERBS = {
    "demo": ("siamese_detr.demonstration", "the whole job on a small example, in minutes"),
    "check": ("siamese_detr.images.check", "find problems in images and labels before a long run"),
    "propose": ("siamese_detr.proposals.propose", "images -> class-agnostic boxes"),
    "pretrain": ("siamese_detr.training.pretrain", "unlabelled images + boxes -> a pre-trained detector"),
    "finetune": ("siamese_detr.training.finetune", "a detector + labels -> a fine-tuned detector"),
    "evaluate": ("siamese_detr.evaluation.evaluate", "COCO metrics of a detector"),
    "predict": ("siamese_detr.evaluation.predict", "boxes and pictures for new images"),
    "compare": ("siamese_detr.comparison.compare", "does pre-training help on my images, and how much?"),
    "report": ("siamese_detr.reporting.report", "a self-contained HTML page of a run or a comparison"),
    "export": ("siamese_detr.interchange.export", "to ONNX, or a lighter Hugging Face directory"),
}

# Configurations that can be read without loading PyTorch: --help and mistyped options are answered at once.
CONFIGS = {
    "pretrain": "siamese_detr.training.pretrain_config",
    "finetune": "siamese_detr.training.finetune_config",
    "evaluate": "siamese_detr.evaluation.evaluate_config",
    "predict": "siamese_detr.evaluation.predict_config",
    "compare": "siamese_detr.comparison.compare_config",
    "report": "siamese_detr.reporting.report_config",
    "export": "siamese_detr.interchange.export_config",
}

__all__ = [
    "VERBS",
    "__version__",
    "check",
    "compare",
    "demo",
    "evaluate",
    "export",
    "finetune",
    "load_config",
    "load_verb",
    "predict",
    "pretrain",
    "propose",
    "report",
]


def load_verb(name: str) -> Any:
    """The function behind a verb of :data:`VERBS`."""
    return getattr(importlib.import_module(VERBS[name][0]), name)


def load_config(name: str) -> Any:
    """The configuration class of a verb of :data:`VERBS`."""
    if name in CONFIGS:
        return getattr(importlib.import_module(CONFIGS[name]), f"{name.capitalize()}Config")
    return load_verb(name).config_class


def __getattr__(name: str) -> Any:
    if name not in VERBS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = load_verb(name)
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted([*globals(), *VERBS])
