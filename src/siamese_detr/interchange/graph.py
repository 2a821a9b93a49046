"""A detector as a graph for other runtimes: ONNX, and OpenVINO made of that."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.results import Job
from siamese_detr.evaluation.runtimes import DESCRIPTION, ExportedModel
from siamese_detr.evaluation.sources import jobs_of
from siamese_detr.files import write_json
from siamese_detr.interchange.export_config import ExportConfig
from siamese_detr.kernels import stock

OPSET = 18
SOFTMAX = ("detr", "table-transformer", "yolos")
"""Models whose last class is "no object"; those of the others are independent."""
CALIBRATION_IMAGES = 300


def export_graph(detector: Detector, folder: Path, config: ExportConfig) -> float:
    """Write ``model.onnx`` or ``model.xml`` (pixel_values and perhaps pixel_mask -> logits, pred_boxes) with an image
    processor that makes what it takes, run it, and return how far it is off.

    Raises:
        UserError: the model cannot be exported, or the graph computes something else.
    """
    fit_processor(detector, config)
    detector.processor.save_pretrained(folder)
    detector.model.config.save_pretrained(folder)  # type: ignore[union-attr,operator]
    stock(detector.model)  # kernels of this package have no place in other runtimes
    about = description(detector)
    file = folder / "model.onnx"
    write_onnx(detector, file, config, about)
    if config.format == "openvino":
        write_openvino(detector, file, config, about)
        file.unlink()
        file = folder / "model.xml"
    write_json(folder / DESCRIPTION, about)
    graph = ExportedModel(file, detector.model.config)  # type: ignore[arg-type]
    difference = 0.0
    for count in (1, 3) if config.dynamic_batch else (1,):
        inputs = sample_inputs(detector, count, seed=count)
        difference = max(
            difference, largest_difference(detector, outputs(detector.model, inputs), outputs(graph, inputs))
        )
    if config.precision == "fp32" and not difference <= config.tolerance:
        raise UserError(
            f"the graph differs from the original by {difference:.1e}, more than {config.tolerance}: not written"
        )
    return difference


def fit_processor(detector: Detector, config: ExportConfig) -> None:
    """Let the image processor give all images the graph's one size: stretched, if it stretched them before; else
    shrunk to fit and padded."""
    processor = detector.processor
    size = {name: side for name, side in dict(processor.size).items() if side is not None}
    short = size.get("shortest_edge") or size.get("height") or 800
    height = config.height or size.get("height") or short
    width = config.width or size.get("width") or round(short * 4 / 3)
    if "height" in size or "pixel_mask" not in processor(images=[np.zeros((64, 64, 3), np.uint8)], return_tensors="pt"):
        processor.size, processor.do_pad = {"height": height, "width": width}, False
    else:
        processor.size = {"max_height": height, "max_width": width}
        processor.do_pad, processor.pad_size = True, {"height": height, "width": width}


def description(detector: Detector) -> dict[str, Any]:
    """What a program needs that has only the file: stored in the graph's metadata, and in export.json."""
    processor = detector.processor
    (pixels, *_) = processor(images=[np.zeros((64, 64, 3), np.uint8)], return_tensors="pt")["pixel_values"]
    return {
        "class_names": detector.class_names,
        "thresholds": detector.thresholds().tolist(),
        "height": pixels.shape[1],
        "width": pixels.shape[2],
        "mean": list(processor.image_mean) if processor.do_normalize else [0, 0, 0],
        "std": list(processor.image_std) if processor.do_normalize else [1, 1, 1],
        "scores": "softmax" if has_softmax(detector) else "sigmoid",
        "opset": OPSET,
    }


def has_softmax(detector: Detector) -> bool:
    model: Any = detector.model
    return model.config.model_type in SOFTMAX


def write_onnx(detector: Detector, file: Path, config: ExportConfig, about: dict[str, Any]) -> None:
    import onnx

    inputs = sample_inputs(detector, 2 if config.dynamic_batch else 1)
    dynamic = {name: {0: torch.export.Dim("batch")} for name in inputs} if config.dynamic_batch else None
    checks = mock.patch.dict(os.environ, {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"})  # have no form in ONNX
    modelling = sys.modules[type(detector.model).__module__]
    with quiet(), checks, mock.patch.object(modelling, "len", length, create=True):
        for optimize in (True, False):  # optimising spoils some graphs
            try:
                program = torch.onnx.export(
                    Raw(detector.model).eval(),
                    tuple(inputs.values()),
                    input_names=list(inputs),
                    output_names=["logits", "pred_boxes"],
                    dynamic_shapes=dynamic,
                    opset_version=OPSET,
                    dynamo=True,
                    optimize=optimize,
                )
            except Exception as error:  # whatever the exporter trips over
                cause = error.__cause__ or error
                reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
                raise UserError(f"this detector cannot be exported to ONNX: {reason}") from error
            assert program is not None
            model = program.model_proto
            with contextlib.suppress(onnx.checker.ValidationError):
                onnx.checker.check_model(model)
                break
    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in about.items()})
    onnx.save(model, file)


def length(value: Any) -> int:
    """In place of ``len`` while a model is exported, which would make a constant of the number of images."""
    return value.shape[0] if isinstance(value, Tensor) else len(value)


def write_openvino(detector: Detector, onnx_file: Path, config: ExportConfig, about: dict[str, Any]) -> None:
    """Write ``model.xml`` and ``model.bin`` beside the ONNX file."""
    import openvino

    model = openvino.convert_model(onnx_file)
    if config.precision == "int8":
        import nncf

        jobs, _, _ = jobs_of(config.calibration)
        with quiet():
            model = nncf.quantize(
                model,
                nncf.Dataset(jobs[:CALIBRATION_IMAGES], lambda job: calibration_inputs(detector, job)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=min(len(jobs), CALIBRATION_IMAGES),
            )
    for name, value in about.items():
        model.set_rt_info(json.dumps(value), ["siamese_detr", name])
    openvino.save_model(model, onnx_file.with_name("model.xml"), compress_to_fp16=config.precision == "fp16")


def calibration_inputs(detector: Detector, job: Job) -> dict[str, np.ndarray]:
    made = detector.processor(images=[job.read()], return_tensors="np")
    return {name: made[name] for name in sample_inputs(detector, 1)}


class Raw(nn.Module):
    """The model from tensors to tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mask = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        out = self.model(pixel_values=pixel_values, **mask)
        return out.logits, out.pred_boxes


def sample_inputs(detector: Detector, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Random images as the processor would give them, the last one partly padding where it pads."""
    made = detector.processor(images=[np.zeros((64, 96, 3), np.uint8)], return_tensors="pt")
    shape = made["pixel_values"].shape[1:]
    inputs = {"pixel_values": torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))}
    if "pixel_mask" in made and getattr(detector.processor, "do_pad", False):
        mask = torch.ones(batch, *shape[1:], dtype=torch.int64)
        mask[-1, :, shape[2] - shape[2] // 4 :] = 0
        inputs["pixel_mask"] = mask
    return inputs


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = model(**inputs)
    return found.logits.float(), found.pred_boxes.float()


def largest_difference(detector: Detector, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Of class probabilities and relative box coordinates, between each of the better half of the queries and the most
    similar one of the other: where two candidates tie, runtimes choose or order the queries otherwise."""
    softmax = has_softmax(detector)
    rows = [
        torch.cat([logits.softmax(-1)[..., :-1] if softmax else logits.sigmoid(), boxes], -1)
        for logits, boxes in (one, other)
    ]
    distances = torch.cdist(rows[0], rows[1], p=float("inf")).amin(-1)
    best = rows[0][..., :-4].amax(-1).argsort(-1, descending=True)[:, : max(1, rows[0].shape[1] // 2)]
    return float(distances.gather(1, best).max())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' chatter."""
    loggers: list[Any] = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export", "nncf")]
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
