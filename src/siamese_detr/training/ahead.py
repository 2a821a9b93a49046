"""Batches that are on a CUDA device when they are asked for: copied during the step before, on their own stream."""

from __future__ import annotations

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

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.ahead_on is None else copied_ahead(batches, self.ahead_on)


def copied_ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Each batch on ``device``, a CUDA device, while the next one is being copied."""
    copying = torch.cuda.Stream(device)
    waiting: list[tuple[Any, torch.cuda.Event]] = []
    for batch in batches:
        with torch.cuda.stream(copying):
            moved = send_to_device(batch, device, non_blocking=True)
            waiting.append((moved, copying.record_event()))
        if len(waiting) > 1:
            yield _received(*waiting.pop(0))
    for moved, copied in waiting:
        yield _received(moved, copied)


def _received(batch: Any, copied: torch.cuda.Event) -> Any:
    """``batch`` for use on the current stream."""
    stream = torch.cuda.current_stream()
    stream.wait_event(copied)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)  # its memory is not given to a later copy before this stream is done with it
        return tensor

    return recursively_apply(used, batch)
