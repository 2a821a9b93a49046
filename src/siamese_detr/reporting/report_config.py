"""What ``report`` can be told; apart from the verb, so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ReportConfig:
    """Write a self-contained HTML page about a pre-training, a fine-tuning or a comparison.

    Args:
        run: directory that pretrain, finetune or compare wrote.
        out: the page; default: report.html in that directory.
        samples: images shown of each kind.
        max_images: validation images looked at, at most.
        score: confidence from which a detection counts in pictures and confusion matrix.
        device: auto, cpu, cuda, mps …
    """

    run: str
    out: str | None = None
    samples: int = 4
    max_images: int = 500
    score: float = 0.3
    device: str = "auto"
