"""How a run is driven, and how its batches are dealt to the processes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import transformers

from siamese_detr.errors import UserError
from siamese_detr.runtime.hardware import emulates_bf16
from siamese_detr.runtime.processes import on_cpu


class Batches(Protocol):
    """Batches of a whole run, lists of dataset keys, the same in every process."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[list[Any]]: ...


@dataclasses.dataclass(kw_only=True)
class RunSettings:
    """How a run is driven, whatever it trains.

    Args:
        out: the run directory.
        steps: updates in all.
        batch_size: samples per update over all processes and micro-batches.
        lr_factor: step (0, 1, …) -> what the learning rates are multiplied by.
        clip: largest gradient norm (0: no clipping).
        accumulate: micro-batches per update.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        device: ``auto`` (the accelerator if there is one) or ``cpu``.
        seed: of everything random.
        workers: data processes per training process.
        save_every: updates between checkpoints.
        keep: newest checkpoints that remain (0: all).
        log_every: updates between logs.
        evaluations: calls of :meth:`BaseTrainer.evaluate`, evenly over the run, the last at its end (0: none).
        max_bad_share: largest share of unreadable images that a run tolerates, 0 to 1.
        compile: run the model through ``torch.compile``.
        kernels: which modules are exchanged for faster ones; see :func:`siamese_detr.kernels.accelerate`.
        report_to: further experiment trackers known to Transformers, e.g. ``wandb``.
    """

    out: Path
    steps: int
    batch_size: int
    lr_factor: Callable[[int], float]
    clip: float = 0.1
    accumulate: int = 1
    precision: str = "fp32"
    device: str = "auto"
    seed: int = 0
    workers: int = 0
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    evaluations: int = 0
    max_bad_share: float = 0.05
    compile: bool = False
    kernels: Literal["auto", "off", "hub"] = "auto"
    report_to: Sequence[str] = ()

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation after the update ``step`` (1, 2, …)."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps

    def arguments(self) -> transformers.TrainingArguments:
        """The stock Trainer's arguments, its own habits (pickles, filters, column removal, printing) switched off."""
        arguments = transformers.TrainingArguments(
            output_dir=str(self.checkpoints),
            max_steps=self.steps,
            gradient_accumulation_steps=self.accumulate,
            max_grad_norm=self.clip,
            bf16=self.precision == "bf16",
            fp16=self.precision == "fp16",
            use_cpu=on_cpu(self.device),
            seed=self.seed,
            save_strategy="steps",
            save_steps=self.save_every,
            save_total_limit=None,
            logging_strategy="steps",
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,
            torch_compile=self.compile,
            report_to=list(self.report_to) or "none",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=[],
            ddp_find_unused_parameters=False,
            ignore_data_skip=True,
        )
        # Where a machine has several GPUs, Trainer would wrap the model of a single process in DataParallel, which can
        # neither pass our batches on nor the results back. One process uses one GPU, the launcher starts as many.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


def check_precision(precision: str, device: str, main: bool) -> None:
    """Refuse a precision that cannot be trained in, and warn of one that is slow here.

    Args:
        precision, device: as in :class:`RunSettings`.
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
    """Raise :class:`UserError` for experiment trackers that Transformers does not know, or that are not installed."""
    there = transformers.integrations.integration_utils.get_available_reporting_integrations()
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


class RankBatches:
    """The batches that one process loads: its share of each, from batch ``start`` on.

    Batches are cut, not dealt out, so the samples of a step do not depend on the number of processes.
    """

    def __init__(self, batches: Batches, rank: int, world: int, start: int = 0) -> None:
        self.batches, self.rank, self.world, self.start = batches, rank, world, start

    def __len__(self) -> int:
        return len(self.batches) - self.start

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in skip(self.batches, self.start):
            yield batch[self.rank :: self.world]


def skip(batches: Batches, start: int) -> Iterator[list[Any]]:
    """Iterate from batch ``start`` on; those before are not even formed where ``batches`` can begin anywhere."""
    if hasattr(batches, "start"):
        later = copy.copy(batches)
        later.start = start
        yield from later
    else:
        yield from itertools.islice(iter(batches), start, None)
