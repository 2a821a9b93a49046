"""Write a detector as an ordinary Hugging Face directory, so that an interrupted save leaves the previous one whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from safetensors import SafetensorError

from siamese_detr.errors import UserError
from siamese_detr.files import TEMPORARY

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import DetectorAdapter

UNTOUCHED = "what was there is untouched: make room, or see to its permissions, and start again (a run: with --resume)"


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


def image_processor(
    adapter: DetectorAdapter,
    *,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    square: bool = False,
) -> Any:
    """The family's stock image processor, with this detector's normalisation.

    Args:
        adapter: the detector.
        shortest_edge, longest_edge: resize to this short side in pixels unless the long side then exceeds
            `longest_edge`; default: the detector's `input_size`.
        square: resize to a square of `shortest_edge` pixels, whatever the aspect ratio. Some families always do.

    Raises:
        UserError: a side the family cannot take.
    """
    size = dict(adapter.input_size)
    if shortest_edge is not None:
        if adapter.square_side is not None and shortest_edge % adapter.square_side:
            raise UserError(
                f"{adapter.family} takes squares whose side is a multiple of {adapter.square_side} pixels, "
                f"not {shortest_edge}; use {max(1, round(shortest_edge / adapter.square_side)) * adapter.square_side}"
            )
        if square or adapter.square_side is not None:
            size = {"height": shortest_edge, "width": shortest_edge}
        else:
            size = {"shortest_edge": shortest_edge, "longest_edge": longest_edge or round(shortest_edge * 1333 / 800)}
    return getattr(transformers, adapter.processor_class)(
        do_resize=True,
        size=size,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(adapter.image_mean),
        image_std=list(adapter.image_std),
        do_pad="height" not in size,
    )


def write_model(model: transformers.PreTrainedModel, folder: str | Path) -> None:
    """``save_pretrained``, with weights that whoever may read the configuration may read too."""
    with quiet():
        model.save_pretrained(folder)
    for file in Path(folder).glob("*.safetensors"):
        shutil.copymode(Path(folder, "config.json"), file)  # safetensors makes files that only their owner may read


def save_detector(
    adapter: DetectorAdapter,
    directory: str | Path,
    *,
    class_names: list[str] | None = None,
    shortest_edge: int | None = None,
    longest_edge: int | None = None,
    square: bool = False,
    provenance: dict[str, Any] | None = None,
) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and siamese_detr.json (provenance).

    All files are written beside the directory and renamed into it at the end.

    Args:
        adapter: the detector.
        directory: created if need be; files of the same names in it are replaced.
        class_names: stored in the model (default: those it has).
        shortest_edge, longest_edge, square: see `image_processor`.
        provenance: plain values added to siamese_detr.json.

    Raises:
        UserError: the directory cannot be written (disk full, permissions).
    """
    directory = Path(directory)
    if class_names is not None:
        adapter.name_classes(class_names)
    processor = image_processor(adapter, shortest_edge=shortest_edge, longest_edge=longest_edge, square=square)
    adapter.input_size = {name: side for name, side in dict(processor.size).items() if side is not None}
    adapter.provenance.update(provenance or {})
    temporary: str | None = None
    try:
        directory.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=f"{TEMPORARY}{directory.name}-", dir=directory.parent)
        write_model(adapter.model, temporary)
        processor.save_pretrained(temporary)
        Path(temporary, "siamese_detr.json").write_text(json.dumps(adapter.provenance, indent=2, default=str) + "\n")
        # The weights first: a config.json never stands without the weights it describes.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.suffix != ".safetensors"):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
            os.replace(file, directory / file.name)
    except OSError as error:
        raise UserError(f"cannot save the detector in {directory}: {error.strerror or error}; {UNTOUCHED}") from None
    except (RuntimeError, SafetensorError) as error:  # safetensors wraps I/O errors
        raise UserError(f"cannot save the detector in {directory}: {error}; {UNTOUCHED}") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
