"""Exported detectors in their own runtimes, in the place of the PyTorch model: what ``predict`` and ``evaluate`` say of
them is what the exported file gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from siamese_detr.errors import UserError

FILES = {"model.onnx": "onnxruntime", "model.xml": "openvino"}
"""The file of an exported detector -> the package that runs it."""
DESCRIPTION = "export.json"
"""The file beside it, with what is in its metadata."""


def exported_file(folder: Path) -> Path | None:
    """The model in a folder that ``export`` wrote for another runtime."""
    if not (folder / DESCRIPTION).is_file():
        return None
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


class ExportedModel(nn.Module):
    """An ONNX or OpenVINO file, callable as the Transformers model it was made of. It runs on the CPU.

    Args:
        file: of the model.
        config: of the Transformers model.

    Raises:
        UserError: its runtime is not installed, or cannot read it.
    """

    def __init__(self, file: Path, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        package = FILES[file.name]
        try:
            if package == "onnxruntime":
                import onnxruntime

                session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
                shapes = {entry.name: entry.shape for entry in session.get_inputs()}
                self._run: Any = lambda inputs: session.run(["logits", "pred_boxes"], inputs)
            else:
                import openvino

                exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else in bf16, on processors that have it
                compiled = openvino.Core().compile_model(str(file), "CPU", exact)
                shapes = {entry.any_name: list(entry.partial_shape) for entry in compiled.inputs}
                self._run = lambda inputs: [compiled(inputs)[name] for name in ("logits", "pred_boxes")]
        except ImportError:
            raise UserError(f"{file} runs in {package}, which is not installed: pip install {package}") from None
        except Exception as error:  # whatever the runtimes raise
            raise UserError(f"{package} cannot read {file}: {str(error).splitlines()[0]}; export it again") from error
        self.names = list(shapes)
        self._single = str(shapes["pixel_values"][0]) == "1"

    def forward(self, **inputs: Tensor) -> Any:
        """``logits`` and ``pred_boxes`` of images; inputs that the graph does not have are left out."""
        arrays = {name: inputs[name].numpy() for name in self.names}
        count = len(inputs["pixel_values"])
        parts = [slice(k, k + 1) for k in range(count)] if self._single else [slice(count)]
        outputs = [self._run({name: array[part] for name, array in arrays.items()}) for part in parts]
        logits, boxes = (torch.from_numpy(np.concatenate(values)) for values in zip(*outputs, strict=True))
        return SimpleNamespace(logits=logits, pred_boxes=boxes)
