"""What of a run outlives its process: weights, optimiser, schedule, loss scale, and the means being logged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.messages import say
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.journal import JsonLines, WindowMeans
from siamese_detr.training.run_config import RunConfig

FIRST = "first-checkpoint.json"
"""Written into the run directory with the first checkpoint: where it is, an absence of checkpoints is a loss."""


class Averages:
    """Exponential moving averages (EMA) of what a model learns: steadier than the weights after any one update.

    The decay after update n is ``min(decay, n / (n + 9))``: the averages reach back over about the last tenth of a
    short run, and over ``1 / (1 - decay)`` updates of a long one.

    Args:
        model: its trainable parameters are averaged, and its buffers (the statistics of batch norms).
        decay: the largest, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        stored = model.state_dict().keys()
        trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        buffers = [(name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point()]
        self.weights = {name: tensor.detach() for name, tensor in trainable + buffers if name in stored}
        self.values = {name: tensor.clone() for name, tensor in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update ``step`` (1, 2, ...)."""
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_(list(self.values.values()), list(self.weights.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While this lasts, the model has the averages in place of its weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, weight in self.weights.items():
            kept = weight.clone()
            weight.copy_(self.values[name])
            self.values[name].copy_(kept)


class RunState:
    """The state of a run after ``step`` updates. There is no random state: every step seeds torch from its number.

    Args:
        model: not wrapped.
        optimizer: over its parameters.
        scheduler: of the optimiser's learning rates.
        scaler: of the loss in fp16, or None.
        averages: of the model's weights, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LambdaLR,
        scaler: torch.amp.GradScaler | None,
        averages: Averages | None = None,
    ) -> None:
        self.model, self.optimizer, self.scheduler, self.scaler = model, optimizer, scheduler, scaler
        self.averages = averages
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
        averages = {} if self.averages is None else {"averages": self.averages.values}
        return checkpoints.save_checkpoint(
            folder,
            self.step,
            tensors={"model": self.model.state_dict(), "optimizer": tensors, **averages},
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
            if self.averages is not None:
                kept = checkpoints.read_tensors(checkpoint, "averages")
                for name, value in self.averages.values.items():
                    value.copy_(kept[name])
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
            f"{last}: bring them back (is a disk not mounted?), or start again in another directory"
        )
    if last:
        say(f"{out} has no checkpoint yet: the {last} steps of its log are done again")
    return None
