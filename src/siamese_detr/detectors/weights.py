"""Read state dicts from files, safely (nothing in a file is ever executed), and write detectors as directories.

A detector is written as an ordinary Hugging Face directory. An interrupted save leaves the previous one whole.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from siamese_detr.errors import UserError
from siamese_detr.files import TEMPORARY

NESTS = ("state_dict", "model", "model_state_dict", "student", "teacher")
"""Entries under which training codes put the state dict."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a .safetensors file or of a PyTorch checkpoint, un-nested, names as in the file; and the options
    (`args`) that many training codes store beside them.

    Args:
        path: the file. PyTorch checkpoints are read with `weights_only=True`.

    Raises:
        UserError: no such file, damaged, with more than tensors and plain values in it, or without tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            loaded: object = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # options stored by many training codes
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"weights {path} is damaged or holds Python objects besides tensors, which are never loaded; "
            "save its state dict alone, best as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"weights {path} cannot be read: {str(error).splitlines()[0]}; fetch the file again") from None
    options = loaded.get("args") if isinstance(loaded, dict) else None
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    for _ in range(2):
        for nest in NESTS:
            if isinstance(loaded, dict) and isinstance(loaded.get(nest), dict):
                loaded = loaded[nest]
                break
    tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}
    if not tensors:
        raise UserError(f"weights {path}: no tensors in it; a state dict is wanted")
    return tensors, options if isinstance(options, dict) else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without its progress bars and load reports: what matters of them is reported by the caller."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
