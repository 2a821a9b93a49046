"""Options of ``report``, apart from the verb so that ``--help`` does not load PyTorch."""

from __future__ import annotations

from dataclasses import dataclass

from siamese_detr.config import Options


@dataclass
class ReportConfig(Options):
    """Write a self-contained HTML page about a pre-training, a fine-tuning or a comparison.

    Args:
        run: output directory of pretrain, finetune or compare.
        out: the HTML file; default: report.html in that directory.
        samples: images to show of each kind.
        max_images: largest number of validation images to evaluate.
        threshold: boxes in pictures and confusion matrix score at least this, 0 to 1; default: for each class the score
            of highest F1 on the validation images.
        device: auto (the accelerator, if there is one), cpu, cuda, cuda:1, mps, ...
    """

    run: str
    out: str | None = None
    samples: int = 4
    max_images: int = 500
    threshold: float | None = None
    device: str = "auto"
