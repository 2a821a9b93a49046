"""How a training run is driven, whatever it trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from siamese_detr.config import Options, check_numbers, effective
from siamese_detr.errors import UserError


@dataclass(kw_only=True)
class RunConfig(Options):
    """What every training run has in common.

    MAY_CHANGE: what a resumed run may be given otherwise than before: it does not change what an update computes, but
    ``steps`` and ``epochs`` what the learning rate's schedule has left.

    Args:
        steps: updates of the weights (default: what EPOCHS amount to).
        epochs: passes over the images, or auto: as many as the number of images asks for.
        batch_size: images per step, over all processes.
        accumulate: parts (micro-batches) in which a step's images are processed, to save memory.
        precision: fp32, bf16 or fp16 (autocast).
        device: auto (the accelerator, if there is one), cpu, cuda, cuda:1, mps, ...
        kernels: auto exchanges modules for faster ones that compute the same; off exchanges none; hub also lets
            Transformers load kernels from the Hugging Face hub (needs the package kernels).
        seed: of everything random.
        workers: data processes per training process (default: all cores but one, at most 8).
        save_every: steps between checkpoints (default of finetune: about as often as the evaluations, at most 500).
        keep: newest checkpoints that remain (0: all).
        log_every: steps between logs.
        max_bad_share: largest share of unreadable images that the run tolerates, 0 to 1.
        progress: show a progress bar.
        resume: continue the run in OUT from its last valid checkpoint (or begin it).
        replay: nonfinite.json of a stopped run: do that step again and report what was not finite.
        report_to: further experiment trackers that Accelerate knows (wandb, mlflow, ...).
    """

    MAY_CHANGE: ClassVar[frozenset[str]] = frozenset(
        (
            *("out", "resume", "replay", "workers", "device", "progress", "report_to", "save_every", "keep"),
            *("log_every", "steps", "epochs", "max_bad_share", "compile", "kernels"),
        )
    )

    if TYPE_CHECKING:  # a verb's own field, because it is given by position
        out: str
    # Options of one verb, which the loop reads of every run.
    compile = False
    ema = 0.0

    steps: int | None = None
    epochs: float | Literal["auto"] = 100
    batch_size: int = 32
    accumulate: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "auto"
    kernels: Literal["auto", "off", "hub"] = "auto"
    seed: int = 0
    workers: int | None = None
    save_every: int | None = 1000
    keep: int = 2
    log_every: int = 10
    max_bad_share: float = 0.05
    progress: bool = True
    resume: bool = False
    replay: str | None = None
    report_to: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise :class:`UserError`, naming the setting, for values that no type can refuse."""
        check_numbers(
            self,
            positive=("steps", "epochs", "batch_size", "accumulate", "save_every", "log_every"),
            not_negative=("seed", "workers", "keep"),
            shares=("max_bad_share",),
        )
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.steps is not None:
            yield ("epochs",), "steps says how long to train"

    def changes(self, before: dict[str, Any]) -> list[str]:
        """Settings that differ from those a run began with and would change its updates, as ``name: old -> new``."""
        return [
            f"{name}: {before[name]} -> {value}"
            for name, value in effective(self).items()
            if name not in self.MAY_CHANGE and name in before and before[name] != value
        ]

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints are."""
        return Path(self.out) / "checkpoints"

    @property
    def skipped(self) -> Path:
        """Where the images that could not be read are listed."""
        return Path(self.out) / "skipped.jsonl"

    def usual_epochs(self, images: int) -> float:
        """Passes over so many images after which more of them bring little."""
        raise NotImplementedError

    def total_steps(self, images: int) -> int:
        """Updates of the whole run on so many images."""
        if self.steps is not None:
            return self.steps
        return self._updates(self.usual_epochs(images) if self.epochs == "auto" else self.epochs, images)

    def budget(self, images: int) -> str:
        """For people: how long the run is, and a warning where that is far too short."""
        steps, usual = self.total_steps(images), self._updates(self.usual_epochs(images), images)
        epochs = steps * self.batch_size / images
        text = f"{steps} steps of {self.batch_size} images ({epochs:.3g} epochs)"
        if steps < usual / 3:
            text += f"; that is short: {images} images usually want {usual} steps, which --epochs auto gives"
        return text

    def _updates(self, epochs: float, images: int) -> int:
        return max(1, round(epochs * images / self.batch_size))
