"""How a training run is driven, whatever it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from siamese_detr.config import check_numbers
from siamese_detr.errors import UserError

Part = TypeVar("Part")


@dataclass(kw_only=True)
class RunConfig:
    """What every training run has in common.

    Args:
        out: run directory.
        steps: updates (default: what EPOCHS amount to).
        epochs: passes over the images; ignored where STEPS is given.
        batch_size: images per update, over all processes.
        accumulate: parts (micro-batches) in which an update's images are processed, to save memory.
        precision: fp32, bf16 or fp16 (autocast).
        device: auto (the accelerator, if there is one) or cpu.
        compile: use torch.compile.
        kernels: auto exchanges modules for faster ones that compute the same; off exchanges none; hub also lets
            Transformers load kernels from the Hugging Face hub (needs the package kernels).
        seed: of everything random.
        ema: average the weights over updates with at most this decay, 0 to 1 (0: do not); the averages are what is
            evaluated and saved.
        workers: data processes per training process (default: all cores but one, at most 8).
        save_every: updates between checkpoints.
        keep: newest checkpoints that remain (0: all).
        log_every: updates between logs.
        max_bad_share: largest share of unreadable images that the run tolerates, 0 to 1.
        progress: show a progress bar.
        resume: continue the run in OUT from its last valid checkpoint (or begin it).
        replay: nonfinite.json of a stopped run: do that step again and report what was not finite.
        report_to: further experiment trackers that Accelerate knows (wandb, mlflow, ...).
    """

    out: str
    steps: int | None = None
    epochs: float = 100
    batch_size: int = 32
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    kernels: Literal["auto", "off", "hub"] = "auto"
    seed: int = 0
    ema: float = 0.0
    workers: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    max_bad_share: float = 0.05
    progress: bool = True
    resume: bool = False
    replay: str | None = None
    report_to: Sequence[str] = ()

    def check(self) -> None:
        """Raise :class:`UserError`, naming the setting, for values that no type can refuse."""
        check_numbers(
            self,
            positive=("steps", "epochs", "batch_size", "accumulate", "save_every", "log_every"),
            not_negative=("seed", "workers", "keep"),
            shares=("max_bad_share", "ema"),
        )
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return Path(self.out) / "checkpoints"

    @property
    def skipped(self) -> Path:
        """Where the images that could not be read are listed."""
        return Path(self.out) / "skipped.jsonl"

    def total_steps(self, images: int) -> int:
        """Updates of the whole run on so many images."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * images / self.batch_size))


def part(kind: type[Part], config: Any) -> Part:
    """The fields of the dataclass ``kind`` that a configuration has."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names if hasattr(config, name)})
