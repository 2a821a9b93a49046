"""Batches that are on a CUDA device when they are asked for: copied during the step before, on their own stream."""

from __future__ import annotations

import itertools
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class AheadLoader(DataLoader):
    """A data loader for one device.

    Args:
        dataset: as the stock loader's.
        device: of the batches' tensors; other values stay as they are.
        options: of the stock loader.
    """

    def __init__(self, dataset: Dataset, device: torch.device, **options: Any) -> None:
        cuda = device.type == "cuda"
        super().__init__(dataset, pin_memory=cuda, **options)
        self.ahead_on = device if cuda else None  # elsewhere batches stay on the host, and the Trainer moves them
        self._copied: Any = lambda: None

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if self.ahead_on is None:
            return batches
        copied = CopiedAhead(batches, self.ahead_on)
        self._copied = weakref.ref(copied)  # data processes end with their iterator, when a run does
        return copied

    def peek(self) -> Any:
        """The batch that comes next, if it is on the device already: its very object, which may be marked."""
        copied = self._copied()
        return None if copied is None else copied.peek()


class CopiedAhead:
    """Each batch on ``device``, a CUDA device, while the next one is being copied."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches, self.device = iter(batches), device
        self.copying = torch.cuda.Stream(device)
        self.waiting: deque[tuple[Any, torch.cuda.Event]] = deque()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        for batch in itertools.islice(self.batches, 2 - len(self.waiting)):
            with torch.cuda.stream(self.copying):
                moved = send_to_device(batch, self.device, non_blocking=True)
                self.waiting.append((moved, self.copying.record_event()))
        if not self.waiting:
            raise StopIteration
        return _received(*self.waiting.popleft())

    def peek(self) -> Any:
        """The next batch; None after the last."""
        if not self.waiting:
            return None
        moved, copied = self.waiting[0]
        torch.cuda.current_stream().wait_event(copied)
        return moved


def _received(batch: Any, copied: torch.cuda.Event) -> Any:
    """``batch`` for use on the current stream."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory is not given to a later copy before this stream is done with it
        return tensor

    return recursively_apply(used, batch)
