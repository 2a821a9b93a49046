"""The verb ``export``: a detector as a clean Hugging Face directory, as ONNX, or for the papers' codes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from siamese_detr.config import verb
from siamese_detr.detectors.loading import find_detector, load_detector
from siamese_detr.detectors.research.checkpoint import save_research_checkpoint
from siamese_detr.detectors.weights import write_model
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.files import TEMPORARY, clean
from siamese_detr.interchange.export_config import ExportConfig
from siamese_detr.messages import say

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Args:
        path: the folder.
        difference: largest difference to the original's scores and (relative) boxes on test inputs.
        bytes: size of the weights' file.
    """

    path: Path
    difference: float
    bytes: int


@verb(ExportConfig)
def export(config: ExportConfig) -> ExportResult:
    """Write a detector for use elsewhere, and check that it computes the same.

    Returns:
        where the files are, and how far their outputs are from the original's.

    Raises:
        UserError: no detector there, packages missing, a folder that cannot be written, or an export that computes
            something else.
    """
    source, out = find_detector(config.model), Path(config.out)
    if out.exists() and out.resolve() == source.resolve():
        raise UserError(f"{out} is the detector itself: choose another folder with --out")
    detector = Detector.load(source, "cpu", without_classes=True)
    try:
        out.mkdir(parents=True, exist_ok=True)
        clean(out)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out) as name:
            folder = Path(name)
            if config.format == "onnx":
                difference = export_onnx(detector, folder, config)
            elif config.format == "research":
                difference = export_research(source, folder, config)
            else:
                difference = export_directory(detector, folder, config)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
                shutil.move(file, out / file.name)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from error
    weights = out / {"hf": "model.safetensors", "onnx": "model.onnx", "research": "checkpoint.pth"}[config.format]
    say(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB, differs from the original by at most {difference:.1e}")
    return ExportResult(out, difference, weights.stat().st_size)


def export_directory(detector: Detector, folder: Path, config: ExportConfig) -> float:
    """Write the Hugging Face directory, load it again, and return how far its outputs are from the original's."""
    inputs = sample_inputs(detector, config, 1)
    before = outputs(detector.model, inputs)
    write_model(detector.model.to(PRECISIONS[config.precision]), folder)  # type: ignore[arg-type]
    detector.processor.save_pretrained(folder)
    again = Detector.load(
        folder, "cpu", without_classes=True
    )  # in float32 whatever is stored: the weights' rounding is what differs
    difference = largest_difference(before, outputs(again.model, inputs))
    if config.precision == "fp32" and difference > 1e-5:
        raise UserError(f"the exported detector differs from the original by {difference:.1e}; nothing was written")
    return difference


def export_research(source: Path, folder: Path, config: ExportConfig) -> float:
    """Write ``checkpoint.pth`` under the research codes' names; tensors are copied, so nothing differs."""
    if config.precision != "fp32":
        raise UserError("research checkpoints are in fp32; leave --precision out")
    save_research_checkpoint(load_detector(source), folder / "checkpoint.pth")
    return 0.0


def export_onnx(detector: Detector, folder: Path, config: ExportConfig) -> float:
    """Write ``model.onnx`` (pixel_values, pixel_mask -> logits, pred_boxes), run it, return how far it is off."""
    if config.precision != "fp32":
        raise UserError("ONNX export is in fp32; convert the file afterwards with onnxruntime's tools")
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX export needs {error.name}: pip install 'siamese-detr[onnx]'") from error
    batch = 2 if config.dynamic_batch else 1
    inputs = sample_inputs(detector, config, batch)
    model = Raw(detector.model).eval()
    dynamic = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs} if config.dynamic_batch else None
    path = folder / "model.onnx"
    with quiet():
        try:
            torch.onnx.export(
                model,
                tuple(inputs.values()),
                str(path),
                input_names=list(inputs),
                output_names=["logits", "pred_boxes"],
                dynamic_shapes=dynamic,
                dynamo=True,
                external_data=False,
            )
        except Exception as error:  # whatever the exporter trips over
            cause = error.__cause__ or error
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            raise UserError(f"this detector cannot be exported to ONNX: {reason}") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    difference = 0.0
    for count in (1, 3) if config.dynamic_batch else (1,):
        trial = sample_inputs(detector, config, count, seed=count)
        taken = {entry.name for entry in session.get_inputs()}
        found = session.run(None, {name: value.numpy() for name, value in trial.items() if name in taken})
        pair = tuple(torch.from_numpy(value) for value in found)
        difference = max(difference, largest_difference(outputs(detector.model, trial), (pair[0], pair[1])))
    if not difference <= config.tolerance:
        raise UserError(
            f"the ONNX model differs from the original by {difference:.1e}, more than {config.tolerance}: not written"
        )
    detector.processor.save_pretrained(folder)
    detector.model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    height, width = (int(side) for side in inputs["pixel_values"].shape[-2:])
    (folder / "onnx.json").write_text(
        json.dumps({"inputs": list(inputs), "height": height, "width": width, "dynamic_batch": config.dynamic_batch})
    )
    return difference


class Raw(nn.Module):
    """The model from tensors to tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        out = self.model(pixel_values=pixel_values, **mask)
        return out.logits, out.pred_boxes


def sample_inputs(detector: Detector, config: ExportConfig, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random images as the processor would give them, the last one partly padding where the model knows padding."""
    from PIL import Image

    size = dict(detector.processor.size)
    short = size.get("shortest_edge") or size.get("height") or 800
    height = config.height or size.get("height") or short
    width = config.width or size.get("width") or round(short * 4 / 3)
    made = detector.processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    random = torch.Generator().manual_seed(seed)
    inputs = {"pixel_values": torch.randn(batch, 3, height, width, generator=random)}
    if "pixel_mask" in made:
        mask = torch.ones(batch, height, width, dtype=torch.int64)
        mask[-1, :, width - width // 4 :] = 0
        inputs["pixel_mask"] = mask
    return inputs


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = model(**inputs)
    return found.logits, found.pred_boxes


def largest_difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Of class probabilities and relative box coordinates."""
    scores = (one[0].float().sigmoid() - other[0].float().sigmoid()).abs().max()
    return max(float(scores), float((one[1].float() - other[1].float()).abs().max()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporter's chatter."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
