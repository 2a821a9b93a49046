"""What ``export`` can be told; apart from the verb, so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from siamese_detr.config import Options


@dataclass
class ExportConfig(Options):
    """Write a detector for use elsewhere, and check that it computes the same.

    Args:
        model: a detector: a run, a Hugging Face directory, a name on the Hub, or a .pth of the papers' codes.
        out: folder to write: config.json, preprocessor_config.json and model.safetensors, model.onnx or checkpoint.pth.
        format: hf (a Hugging Face directory), onnx (needs the extra `onnx`), or research (a checkpoint for the papers'
            codes of DETR, Conditional DETR and Deformable DETR).
        precision: of the weights: fp32, fp16 or bf16; onnx and research: fp32 only.
        height: onnx: of the image in the graph; default: what the detector's image processor makes.
        width: onnx: likewise.
        dynamic_batch: onnx: any number of images per call.
        tolerance: onnx: largest difference to the PyTorch model's boxes and scores that is accepted.
    """

    model: str
    out: str
    format: Literal["hf", "onnx", "research"] = "hf"
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    height: int | None = None
    width: int | None = None
    dynamic_batch: bool = True
    tolerance: float = 1e-3

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.format != "onnx":
            yield ("height", "width", "dynamic_batch", "tolerance"), f"format is {self.format}"
