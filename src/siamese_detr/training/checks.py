"""What is refused before a run begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from accelerate.tracking import get_available_trackers

from siamese_detr.errors import UserError
from siamese_detr.runtime.hardware import emulates_bf16
from siamese_detr.runtime.processes import on_cpu


def check_precision(precision: str, device: str, main: bool) -> None:
    """Refuse a precision that cannot be trained in, and warn of one that is slow here.

    Args:
        precision, device: as in :class:`~siamese_detr.training.run_config.RunConfig`.
        main: whether this is the process that warns.

    Raises:
        UserError: fp16 without an accelerator.
    """
    cpu = on_cpu(device)
    if cpu and precision == "fp16":
        raise UserError("precision fp16 needs an accelerator: use bf16 or fp32 here")
    if main and precision == "bf16" and emulates_bf16("cpu" if cpu else "cuda"):
        other = "fp32" if cpu else "fp16"
        warnings.warn(f"this processor only emulates bf16, which is slow: use precision {other}", stacklevel=2)


def check_trackers(report_to: Sequence[str]) -> None:
    """Raise :class:`UserError` for experiment trackers that Accelerate does not know, or that are not installed."""
    there = [str(name) for name in get_available_trackers()]
    if unknown := [name for name in report_to if name not in (*there, "all", "none")]:
        raise UserError(
            f"report_to: there is no tracker {unknown[0]!r}, or its package is not installed; "
            f"there are: {', '.join(there) or 'none'}"
        )


def check_batch_size(batch_size: int, accumulate: int, processes: int) -> None:
    """Raise :class:`UserError` if the images of an update cannot be dealt out evenly."""
    if batch_size % (processes * accumulate):
        raise UserError(
            f"batch_size {batch_size} must be a multiple of processes x accumulate ({processes} x {accumulate})"
        )
