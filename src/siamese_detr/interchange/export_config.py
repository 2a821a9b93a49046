"""What ``export`` can be told; apart from the verb, so that ``--help`` need not load PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from siamese_detr.config import Options, check_numbers
from siamese_detr.errors import UserError

PRECISIONS = {
    "hf": ("fp32", "fp16", "bf16"),
    "onnx": ("fp32",),
    "openvino": ("fp32", "fp16", "int8"),
    "research": ("fp32",),
}


@dataclass
class ExportConfig(Options):
    """Write a detector for use elsewhere, and check that it computes the same.

    Args:
        model: a detector: a run, a Hugging Face directory, a name on the Hub, or a .pth of the papers' codes.
        out: folder to write: config.json, preprocessor_config.json and model.safetensors, model.onnx, model.xml or
            checkpoint.pth.
        format: hf (a Hugging Face directory), onnx (opset 18; needs the extra `onnx`), openvino (needs the extra
            `openvino`), or research (a checkpoint for the papers' codes of DETR, Conditional DETR and Deformable DETR).
        precision: of the weights: fp32; hf: also fp16 and bf16; openvino: also fp16 and int8.
        push: hf: also upload the folder to the Hugging Face Hub under this name (USER/NAME), as a private model.
        calibration: openvino int8: images (folder, list or COCO JSON) like those to come, from whose first 300 the
            ranges of numbers are taken.
        height: onnx, openvino: of the image in the graph; default: what the detector's image processor makes.
        width: likewise.
        dynamic_batch: onnx, openvino: any number of images per call.
        tolerance: onnx, openvino in fp32: largest difference to the PyTorch model's boxes and scores that is accepted.
    """

    model: str
    out: str
    format: Literal["hf", "onnx", "openvino", "research"] = "hf"
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    push: str | None = None
    calibration: str | None = None
    height: int | None = None
    width: int | None = None
    dynamic_batch: bool = True
    tolerance: float = 1e-3

    def check(self) -> None:
        check_numbers(self, positive=("height", "width", "tolerance"))
        if self.precision not in PRECISIONS[self.format]:
            raise UserError(
                f"format {self.format} has precision {', '.join(PRECISIONS[self.format])}, not {self.precision}"
            )
        if self.precision == "int8" and self.calibration is None:
            raise UserError("int8 needs calibration: a folder of images like those to come")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.format not in ("onnx", "openvino"):
            yield ("height", "width", "dynamic_batch", "tolerance"), f"format is {self.format}"
        if self.format != "hf":
            yield ("push",), f"format is {self.format}"
        if self.precision != "int8":
            yield ("calibration",), f"precision is {self.precision}"
