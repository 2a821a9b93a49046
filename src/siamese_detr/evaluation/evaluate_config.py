"""The options of ``evaluate``, apart from the verb so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from siamese_detr.config import Options, check_numbers
from siamese_detr.errors import UserError


@dataclass
class EvaluateConfig(Options):
    """Measure a detector on labelled images: COCO AP, AP50, AP75, AP by size and AR, overall and per class.

    Args:
        model: a detector: a run, a Hugging Face directory, a name on the Hub, or a .pth of the papers' codes.
        labels: COCO JSON, VOC folder or YOLO data.yaml with the boxes to find.
        images: folder of the images, if it is not the usual one.
        split: of YOLO (default: val) and VOC labels.
        out: write the metrics to this JSON file (and the detections beside it, as COCO results).
        batch_size: images per forward pass.
        workers: data processes.
        device: auto (the accelerator, if there is one), cpu, cuda, cuda:1, mps, ...
        top_k: most detections per image, at most the 100 for which COCO's metrics are defined.
    """

    model: str
    labels: str
    images: str | None = None
    split: str | None = None
    out: str | None = None
    batch_size: int = 8
    workers: int = 1
    device: str = "auto"
    top_k: int = 100

    def check(self) -> None:
        check_numbers(self, positive=("top_k", "batch_size"), not_negative=("workers",))
        if self.top_k > 100:
            raise UserError(f"top_k must be at most 100, for which COCO's metrics are defined, not {self.top_k}")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if Path(self.labels).suffix.lower() == ".json":
            yield ("split",), "a COCO JSON has no splits"
