"""What of a run outlives its process: weights, optimiser, schedule, loss scale, and the means being logged."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.journal import JsonLines, WindowMeans
from siamese_detr.training.run_config import RunConfig

FIRST = "first-checkpoint.json"
"""Written into the run directory with the first checkpoint: where it is, an absence of checkpoints is a loss."""


class RunState:
    """The state of a run after ``step`` updates. There is no random state: every step seeds torch from its number.

    Args:
        model: not wrapped.
        optimizer: over its parameters.
        scheduler: of the optimiser's learning rates.
        scaler: of the loss in fp16, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.means = WindowMeans()
        self.step = 0
        self.saved_step = 0
        """Of the newest checkpoint, or the one that the run continues from."""

    def write(self, folder: Path, means: dict[str, Any], keep: int = 0) -> Path:
        """Write ``folder/checkpoint-<step>``; on one process.

        Args:
            folder: of the checkpoints.
            means: the state of :attr:`means`, which takes all processes.
            keep: newest checkpoints that remain (0: all).
        """
        tensors, groups = checkpoints.pack_optimizer(self.optimizer, self.model)
        return checkpoints.save_checkpoint(
            folder,
            self.step,
            tensors={"model": self.model.state_dict(), "optimizer": tensors},
            documents={
                "optimizer": groups,
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "trainer_state": {"global_step": self.step},
                "means": means,
            },
            keep=keep,
        )

    def restore(self, checkpoint: Path, device: torch.device) -> None:
        """Read what :meth:`write` wrote, of a verified checkpoint."""
        try:
            self.model.load_state_dict(checkpoints.read_tensors(checkpoint, "model"))
        except RuntimeError as error:
            raise UserError(
                f"checkpoint {checkpoint} is of another model: {str(error).splitlines()[-1].strip()}"
            ) from error
        with checkpoints.understood(checkpoint):
            tensors = checkpoints.read_tensors(checkpoint, "optimizer")
            document = checkpoints.read_document(checkpoint, "optimizer")
            checkpoints.unpack_optimizer(self.optimizer, self.model, tensors, document)
            self.scheduler.load_state_dict(checkpoints.read_document(checkpoint, "scheduler"))
            scale = checkpoints.read_document(checkpoint, "scaler")
            if self.scaler is not None and scale is not None:
                self.scaler.load_state_dict(scale)
            self.means.restore(checkpoints.read_document(checkpoint, "means"), device)
            self.step = self.saved_step = int(checkpoints.read_document(checkpoint, "trainer_state")["global_step"])


def note_first(out: Path, step: int) -> None:
    """Remember that there was a checkpoint."""
    if not (out / FIRST).exists():
        write_json(out / FIRST, {"step": step})


def newest_checkpoint(config: RunConfig) -> int | None:
    """Step of the newest valid checkpoint of a run that is to go on, or None if none was ever written.

    Raises:
        UserError: the checkpoints are all gone, damaged, or of another release.
    """
    if (found := checkpoints.latest_valid(config.checkpoints)) is not None:
        return checkpoints.step_of(found)
    out = Path(config.out)
    last = max((record.get("step", 0) for record in JsonLines(out / "log.jsonl").read()), default=0)
    if (out / FIRST).exists():
        raise UserError(
            f"no checkpoint is left in {config.checkpoints}, though the run saved some and its log goes to step "
            f"{last}: bring them back (is a disk not mounted?), or begin anew in another directory"
        )
    if last:
        print(f"{out} has no checkpoint yet: the {last} steps of its log are done again", file=sys.stderr)
    return None
