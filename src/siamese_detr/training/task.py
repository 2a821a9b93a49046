"""What a run trains, as the loop sees it: a model, its batches, and the loss of a batch."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from PIL.Image import Image

    from siamese_detr.runtime.processes import Team
    from siamese_detr.training.loop import Loop
    from siamese_detr.training.state import Averages


class Batches(Protocol):
    """The batches of a whole run, lists of dataset keys for all processes together; the same in every process."""

    start: int
    """Iteration begins with the batch of this number."""

    def __iter__(self) -> Iterator[list[Any]]: ...


class Callback:
    """Follows a run from Python: ``finetune(..., callbacks=[Mine()])``. Its methods are called on the main process.

    A method that raises ends the run: it is saved first, and can be resumed.
    """

    def on_log(self, step: int, values: Mapping[str, float]) -> None:
        """After update ``step`` (1, 2, ...), with what log.jsonl has of it: loss, its terms, learning_rate, ..."""

    def on_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """After an evaluation, with AP, AP50, ... in [0, 1]; fine-tuning only."""


class Callbacks:
    """Calls the run's callbacks, and remembers the first that failed.

    Args:
        callbacks: in their order, the same in all processes; the main process calls them.
        team: the processes.
    """

    def __init__(self, callbacks: Sequence[Callback], team: Team) -> None:
        self._callbacks, self._team, self._failure = callbacks, team, ""

    def call(self, event: str, step: int, values: Mapping[str, float]) -> None:
        """Call the method ``event`` of all callbacks; one that raises does not keep the others from being called."""
        for callback in self._callbacks if self._team.main else ():
            try:
                getattr(callback, event)(step, values)
            except Exception as error:
                traceback.print_exc()
                self._failure = self._failure or f"{type(callback).__name__}.{event} failed: {error!r}"

    def failure(self) -> str:
        """What failed; empty if nothing did. A collective, if there are callbacks."""
        if not self._callbacks or not self._team.any(bool(self._failure)):
            return ""
        return self._failure or "a callback failed in the main process"


class Task:
    """Pre-training, fine-tuning, ...: what :class:`~siamese_detr.training.loop.Loop` drives.

    Args:
        model: the module whose state is saved; frozen parameters must have ``requires_grad`` False.
        dataset: indexed by the keys that ``batches`` holds.
        batches: one list of keys per micro-batch.
        collate: samples -> batch, a dict; ``batch["skipped"]``, if there, lists (path, reason) of unreadable images,
            which its tensors (samples first) are without.
        epoch_size: samples in an epoch.
    """

    verb: str
    """The command whose run this is."""
    averages: Averages | None = None
    """Of the model's weights, if the run averages them; set by the loop."""
    evaluated: int = 0
    """Images that all evaluations of the run will see."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Dataset,
        batches: Batches,
        collate: Callable[[list[Any]], dict[str, Any]],
        epoch_size: int,
    ) -> None:
        self.model, self.dataset, self.batches, self.collate = model, dataset, batches, collate
        self.epoch_size = epoch_size

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one micro-batch, a mean over it, and its named terms to log.

        Args:
            model: the task's model, as the loop has wrapped it.
            batch: what ``collate`` gave, its tensors on the device.
        """
        raise NotImplementedError

    def largest(self, images: int) -> dict[str, Any] | None:
        """A batch of so many images of the largest size there may be, to try what a step takes; None: not known."""
        return None

    def pictures(self) -> Mapping[str, Image]:
        """What the run is about to learn from, by name; asked of the main process only, before the first step."""
        return {}

    def saved(self, step: int) -> None:
        """Called on the main process after each checkpoint."""

    def evaluates_at(self, step: int) -> bool:
        """Whether there is an evaluation after update ``step`` (1, 2, ...)."""
        return False

    def evaluate(self, loop: Loop) -> None:
        """Evaluate, on all processes; may call ``loop.stop_between_steps`` after each batch."""

    def lacks_evaluation(self, step: int) -> bool:
        """Whether a run continued at ``step`` must first repeat its evaluation; asked of the main process only."""
        return False

    def stopped_early(self, step: int) -> bool:
        """Whether more updates than ``step`` would be in vain; asked after evaluations, of the main process only."""
        return False

    def still_unreadable(self, path: str) -> bool:
        """Whether the image of that path, which could not be read before, is in the data set and still cannot."""
        return True


@dataclass
class Update:
    """What the backward passes of one update gave.

    Args:
        losses: of the micro-batches.
        terms: their named terms.
        norm: of the gradient.
    """

    losses: list[Tensor] = field(default_factory=list)
    terms: list[Mapping[str, Tensor]] = field(default_factory=list)
    norm: Tensor = field(default_factory=lambda: torch.zeros(()))


class RankBatches:
    """The batches that one process loads: its share of each, from batch ``start`` on.

    Batches are cut, not dealt out, so the samples of a step do not depend on the number of processes.
    """

    def __init__(self, batches: Batches, rank: int, world: int, start: int = 0) -> None:
        self.batches, self.rank, self.world, self.start = batches, rank, world, start

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in skip(self.batches, self.start):
            yield batch[self.rank :: self.world]


def skip(batches: Batches, start: int) -> Iterator[list[Any]]:
    """The batches from number ``start`` on; those before are not even formed."""
    later = copy.copy(batches)
    later.start = start
    return iter(later)


def sizes_vary(maps: Iterable[Tensor], mask: Tensor) -> None:
    """Let ``torch.compile`` compile once for pictures of all sizes, not again for the first new ones. On a GPU it
    compiles twice: attention masks whose length is no multiple of 8 are a case of their own.

    Args:
        maps: (..., H, W) each.
        mask: (B, H, W).
    """
    for tensor in (*maps, mask):
        torch._dynamo.maybe_mark_dynamic(tensor, (tensor.ndim - 2, tensor.ndim - 1))
