"""Write a detector as an ordinary Hugging Face directory, so that an interrupted save leaves the previous one whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

from siamese_detr.detectors.weights import quiet
from siamese_detr.errors import UserError
from siamese_detr.files import TEMPORARY


def write_model(model: transformers.PreTrainedModel, folder: str | Path) -> None:
    """``save_pretrained``, with weights that whoever may read the configuration may read too."""
    with quiet():
        model.save_pretrained(folder)
    for file in Path(folder).glob("*.safetensors"):
        shutil.copymode(Path(folder, "config.json"), file)  # safetensors makes files that only their owner may read


def save_detector(
    model: transformers.PreTrainedModel, processor: Any, provenance: dict[str, Any], directory: str | Path
) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and siamese_detr.json (provenance).

    All files are written beside the directory and renamed into it at the end.

    Raises:
        UserError: the directory cannot be written (disk full, permissions).
    """
    directory = Path(directory)
    temporary: str | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f"{TEMPORARY}{directory.name}-", dir=directory.parent)
        write_model(model, temporary)
        processor.save_pretrained(temporary)
        Path(temporary, "siamese_detr.json").write_text(json.dumps(provenance, indent=2, default=str) + "\n")
        # The weights first: a config.json never stands without the weights it describes.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix != ".safetensors"):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(file, directory / file.name)
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors wraps I/O errors
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot save the detector in {directory}: {reason}; the previous files are untouched: free disk space or "
            "correct the permissions, and start again (a run: with --resume)"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
