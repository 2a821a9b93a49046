"""What of a run outlives its process: saving and restoring weights, optimizer, schedule and the means being logged.

Transformers' ``Trainer`` writes pickles, and reloads detectors' weights under other names than it saved them; these
overrides write the module's own state through :mod:`.checkpoint` and restore it strictly.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.journal import WindowMeans
from siamese_detr.training.settings import RunSettings

STATE_KEYS = ["epoch", "global_step", "max_steps", "logging_steps", "save_steps", "eval_steps", "train_batch_size"]
STATE_KEYS += ["best_metric", "best_global_step", "best_model_checkpoint"]
"""What of Trainer's state is kept: few enough to be read by any release of Transformers."""
FIRST = "first-checkpoint.json"
"""Written into the run directory with the first checkpoint: where it is, an absence of checkpoints is a loss."""


class PersistentTrainer(transformers.Trainer):
    """A stock ``Trainer`` with safe, atomic checkpoints.

    Args:
        model: the module whose state is saved.
        settings: how the run is driven.
        optimizer: made from the model's parameters, with the base learning rates.
        options: passed on to the stock Trainer.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LambdaLR

    def __init__(
        self, model: nn.Module, settings: RunSettings, optimizer: torch.optim.Optimizer, **options: Any
    ) -> None:
        self.settings = settings
        self.means = WindowMeans()
        self.saved_step = 0  # of the newest checkpoint, or the one the run continues from
        super().__init__(model, settings.arguments(), optimizers=(optimizer, None), **options)

    def saved(self, checkpoint: Path) -> None:
        """Called on the main process after each checkpoint."""

    def _across(self, values: Tensor, meanwhile: Callable[[], None] | None = None) -> list[float]:
        """Sums over all processes, as numbers (one sync). ``meanwhile``, called for a CUDA device only, gives it work
        to do while the host waits.
        """
        values = values.to(self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(values)
        if meanwhile is not None and values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.current_stream().record_event()
            meanwhile()
            copied.synchronize()
        return values.tolist()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.settings.lr_factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs_trained, trained = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # this run's intervals, not those of the checkpoint
        return epochs_trained, trained

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        means = self.means.state()  # a collective: every process
        error: UserError | OSError | None = None
        if self.args.should_save:
            try:
                self.saved(self._write_checkpoint(self.settings.checkpoints, means))
                if not (self.settings.out / FIRST).exists():
                    write_json(self.settings.out / FIRST, {"step": self.state.global_step})
            except (UserError, OSError) as caught:
                error = caught
        if self._across(torch.tensor([float(error is not None)]))[0]:
            raise error or UserError("the main process could not save: see its message")
        self.saved_step = self.state.global_step

    def _write_checkpoint(self, folder: Path, means: dict[str, Any]) -> Path:
        optimizer, groups = checkpoints.pack_optimizer(self.optimizer, self.model)
        scaler = getattr(self.accelerator, "scaler", None)
        return checkpoints.save_checkpoint(
            folder,
            self.state.global_step,
            tensors={"model": self.model.state_dict(), "optimizer": optimizer},
            documents={
                "optimizer": groups,
                "scheduler": self.lr_scheduler.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "trainer_state": {key: getattr(self.state, key) for key in STATE_KEYS},
                "means": means,
            },
            keep=self.settings.keep,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            (model or self.model).load_state_dict(checkpoints.read_tensors(Path(resume_from_checkpoint), "model"))
        except RuntimeError as error:
            raise UserError(
                f"checkpoint {resume_from_checkpoint} is of another model: {str(error).splitlines()[-1].strip()}"
            ) from error
        with checkpoints.understood(Path(resume_from_checkpoint)):  # read by Trainer itself right after
            transformers.TrainerState.load_from_json(str(Path(resume_from_checkpoint) / "trainer_state.json"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path = Path(checkpoint)
        with checkpoints.understood(path):
            document = checkpoints.read_document(path, "optimizer")
            tensors = checkpoints.read_tensors(path, "optimizer")
            checkpoints.unpack_optimizer(self.optimizer, self.model, tensors, document)
            self.lr_scheduler.load_state_dict(checkpoints.read_document(path, "scheduler"))
            self.means.restore(checkpoints.read_document(path, "means"), self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is None or scaler is None:
            return
        with checkpoints.understood(Path(checkpoint)):
            if (state := checkpoints.read_document(Path(checkpoint), "scaler")) is not None:
                scaler.load_state_dict(state)

    def _save_rng_state(self, output_dir: str) -> None:
        """There is none: see :func:`siamese_detr.randomness.seed_torch`."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none."""
