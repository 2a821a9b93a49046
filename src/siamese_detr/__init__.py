"""Pre-train DETR-family object detectors on unlabelled images, fine-tune them with few labels.

The verbs are functions of this package and commands of ``siamese-detr``, with the same arguments::

    import siamese_detr

    siamese_detr.pretrain(images="photos", out="runs/pretrained")
    siamese_detr.finetune(train="train.json", val="val.json", model="runs/pretrained", out="runs/detector")
    siamese_detr.load("runs/detector").predict("photo.jpg")[0].plot()

``help(siamese_detr.pretrain)`` explains the arguments.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, NamedTuple

# Read by OpenMP when PyTorch is loaded, and inherited by data workers: a thread that waits for another sleeps instead
# of keeping a core busy, which on a shared machine costs the others (and this run) most of their time.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from siamese_detr.comparison.compare import compare as compare
    from siamese_detr.demonstration import demo as demo
    from siamese_detr.evaluation.evaluate import evaluate as evaluate
    from siamese_detr.evaluation.inference import Detector
    from siamese_detr.evaluation.predict import predict as predict
    from siamese_detr.images.check import check as check
    from siamese_detr.interchange.export import export as export
    from siamese_detr.proposals.propose import propose as propose
    from siamese_detr.reporting.report import report as report
    from siamese_detr.training.finetune import finetune as finetune
    from siamese_detr.training.pretrain import pretrain as pretrain

    load = Detector.load

__version__ = "0.1.0"


class Command(NamedTuple):
    """Where a verb lives.

    Args:
        module: of its function, which has the verb's name.
        config: module of its configuration, which loads no PyTorch: --help and mistyped options are answered at once.
        about: what it is for.
        continued: whether it goes on where it was, started again.
    """

    module: str
    config: str
    about: str
    continued: bool = False


def _command(module: str, about: str, *, own_config: bool = True, continued: bool = False) -> Command:
    module = f"siamese_detr.{module}"
    return Command(module, module + "_config" * own_config, about, continued)


# Imported only when asked for: a command's start-up must not pay for the others.
VERBS = {
    "demo": _command("demonstration", "the whole job on a small example, in minutes", own_config=False),
    "check": _command("images.check", "find problems in images and labels before a long run", own_config=False),
    "propose": _command("proposals.propose", "images -> class-agnostic boxes", own_config=False, continued=True),
    "pretrain": _command("training.pretrain", "unlabelled images + boxes -> a pre-trained detector", continued=True),
    "finetune": _command("training.finetune", "a detector + labels -> a fine-tuned detector", continued=True),
    "evaluate": _command("evaluation.evaluate", "COCO metrics of a detector"),
    "predict": _command("evaluation.predict", "boxes and pictures for new images"),
    "compare": _command("comparison.compare", "does pre-training help on my images, and how much?", continued=True),
    "report": _command("reporting.report", "a self-contained HTML page of a run or a comparison"),
    "export": _command("interchange.export", "to ONNX, or a lighter Hugging Face directory"),
}

__all__ = ["VERBS", "__version__", "load", "load_config", "load_verb", *VERBS]


def load_verb(name: str) -> Any:
    """The function behind a verb of :data:`VERBS`."""
    return getattr(importlib.import_module(VERBS[name].module), name)


def load_config(name: str) -> Any:
    """The configuration class of a verb of :data:`VERBS`."""
    return getattr(importlib.import_module(VERBS[name].config), f"{name.capitalize()}Config")


def __getattr__(name: str) -> Any:
    if name == "load":
        function = importlib.import_module("siamese_detr.evaluation.inference").Detector.load
    elif name in VERBS:
        function = load_verb(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = function
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
