"""The verb ``export``: a detector as a clean Hugging Face directory, for other runtimes, or for the papers' codes."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch

from siamese_detr.config import verb
from siamese_detr.detectors.loading import find_detector, load_detector
from siamese_detr.detectors.research.checkpoint import save_research_checkpoint
from siamese_detr.detectors.weights import first_line, write_model
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.runtimes import ExportedModel
from siamese_detr.files import TEMPORARY, clean
from siamese_detr.interchange.export_config import ExportConfig
from siamese_detr.interchange.graph import export_graph, largest_difference, outputs, sample_inputs
from siamese_detr.interchange.model_card import FILE
from siamese_detr.messages import say

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
WEIGHTS = {"hf": "model.safetensors", "onnx": "model.onnx", "openvino": "model.bin", "research": "checkpoint.pth"}


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
    check_packages(config)
    detector = Detector.load(source, "cpu", without_classes=True)
    if isinstance(detector.model, ExportedModel):
        raise UserError(f"{source} is an export itself: name the detector it was made of")
    there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        clean(out)
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=out) as name:
            folder = Path(name)
            if config.format in PACKAGES:
                difference = export_graph(detector, folder, config)
            elif config.format == "research":
                difference = export_research(source, folder, config)
            else:
                difference = export_directory(detector, source, folder, config)
            for file in sorted(folder.iterdir(), key=lambda file: file.name == "config.json"):
                shutil.move(file, out / file.name)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror or error}") from error
    finally:
        if not there:
            with contextlib.suppress(OSError):  # it holds what was exported, or was not made
                out.rmdir()
    if config.push is not None:
        push(out, config.push)
    weights = out / WEIGHTS[config.format]
    say(f"{weights}: {weights.stat().st_size / 1e6:.1f} MB, differs from the original by at most {difference:.1e}")
    return ExportResult(out, difference, weights.stat().st_size)


def export_directory(detector: Detector, source: Path, folder: Path, config: ExportConfig) -> float:
    """Write the Hugging Face directory, load it again, and return how far its outputs are from the original's."""
    inputs = sample_inputs(detector, 1)
    before = outputs(detector.model, inputs)
    write_model(detector.model.to(DTYPES[config.precision]), folder)  # type: ignore[arg-type]
    detector.processor.save_pretrained(folder)
    for file in (source / FILE, source / "siamese_detr.json"):
        if file.is_file():
            text = file.read_text(encoding="utf-8").replace(str(source.absolute()), config.push or config.out)
            (folder / file.name).write_text(text, encoding="utf-8")
    # In float32 whatever is stored: the weights' rounding is what differs.
    again = Detector.load(folder, "cpu", without_classes=True)
    difference = largest_difference(detector, before, outputs(again.model, inputs))
    if config.precision == "fp32" and difference > 1e-5:
        raise UserError(f"the exported detector differs from the original by {difference:.1e}; nothing was written")
    return difference


def export_research(source: Path, folder: Path, config: ExportConfig) -> float:
    """Write ``checkpoint.pth`` under the research codes' names; tensors are copied, so nothing differs."""
    save_research_checkpoint(load_detector(source), folder / "checkpoint.pth")
    return 0.0


def check_packages(config: ExportConfig) -> None:
    """Raise :class:`UserError` if a package that a format needs is not installed."""
    for package in (*PACKAGES.get(config.format, ()), *(["nncf"] if config.precision == "int8" else [])):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"export to {config.format} needs {package}: pip install 'siamese-detr[{config.format}]'"
            ) from None


def push(folder: Path, name: str) -> None:
    """Upload a folder to the Hugging Face Hub.

    Raises:
        UserError: not logged in, no such user, no network.
    """
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload from siamese-detr")
    except Exception as error:  # whatever the network, the Hub and its client may say
        raise UserError(
            f"{folder} is written, but cannot be uploaded as {name}: {first_line(error)}; log in with "
            "`hf auth login`, check the name and the network"
        ) from error
    say(f"uploaded: {done}")
