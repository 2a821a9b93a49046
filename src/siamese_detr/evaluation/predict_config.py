"""The options of ``predict``, apart from the verb so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from siamese_detr.config import Options, check_numbers


@dataclass
class PredictConfig(Options):
    """Detect objects in images: JSON with the boxes, and pictures with them drawn.

    Args:
        model: a detector: a run, a Hugging Face directory, a name on the Hub, or a .pth of the papers' codes.
        images: an image, a folder (searched recursively), a list file (.txt) or a COCO JSON.
        out: folder for predictions.json, coco_results.json (whose ids of images and categories are those of
            predictions.json) and pictures/.
        threshold: boxes must score at least this, 0 to 1; default: for each class the score of highest F1 on the
            validation images, which fine-tuning stores with the detector, else 0.5.
        nms: of two boxes of a class whose IoU is above this, 0 to 1, the worse one is left out; 1: none is.
        top_k: most boxes per image.
        draw: also write the pictures with the boxes drawn.
        labels: also write boxes and scores as labels of this form (COCO, VOC or YOLO), with links to the images, into
            OUT/labels, for ``finetune`` (--train LABELS.json OUT/labels) or a labelling tool. Images in which nothing
            is found are left out.
        batch_size: images per forward pass.
        workers: data processes.
        device: auto (the accelerator, if there is one), cpu, cuda, cuda:1, mps, ...
    """

    model: str
    images: str
    out: str
    threshold: float | None = None
    nms: float = 0.8
    top_k: int = 100
    draw: bool = True
    labels: Literal["coco", "voc", "yolo"] | None = None
    batch_size: int = 8
    workers: int = 1
    device: str = "auto"

    def check(self) -> None:
        check_numbers(self, positive=("top_k", "batch_size"), not_negative=("workers",), shares=("threshold", "nms"))
