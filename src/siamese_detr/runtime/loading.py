"""Batches made by data processes, and how they get from there to the training process."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from siamese_detr.runtime.processes import begin_worker

SHARED_MEMORY = "/dev/shm"
"""Where Linux keeps what processes share; containers often have only 64 MB of it."""
RESERVE = 3
"""Shared memory is used while this many batches of every data process fit into what is free of it: those made ahead,
and one more."""
PAGE = 4096
"""Each tensor takes whole pages of it, and PyTorch keeps a header beside."""


class Loader:
    """Batches of a data set; each iteration starts data processes of its own, which end with the iterator.

    Args:
        dataset: indexed by the keys that ``batches`` holds.
        batches: lists of keys.
        collate: samples -> batch.
        workers: data processes (0: this one).
        pin_memory: put batches where a GPU can fetch them from.
        prefetch: batches that each data process makes ahead.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Any,
        collate: Callable[[list[Any]], Any],
        workers: int,
        pin_memory: bool = False,
        prefetch: int = 2,
    ) -> None:
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=HandOver(collate, workers) if workers else collate,
            num_workers=workers,
            worker_init_fn=begin_worker,
            pin_memory=pin_memory,
            prefetch_factor=prefetch if workers else None,
        )

    def __iter__(self) -> Iterator[Any]:
        return (batch.open() if isinstance(batch, Packed) else batch for batch in self.loader)


@dataclass(frozen=True)
class Packed:
    """A batch as bytes, which go through a pipe."""

    content: bytes

    def open(self) -> Any:
        return pickle.loads(self.content)


class HandOver:
    """Collates in a data process. PyTorch hands tensors over in shared memory; a batch that does not fit would be lost
    there, and the training process would wait for it for ever. Where that is short, batches go through a pipe.

    Args:
        collate: samples -> batch.
        workers: data processes that share the memory.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], workers: int) -> None:
        self.collate, self.workers = collate, workers

    def __call__(self, samples: list[Any]) -> Any:
        batch = self.collate(samples)
        needed = RESERVE * self.workers * tensor_bytes(batch)
        return batch if needed <= free_shared_memory() else Packed(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL))


def free_shared_memory() -> float:
    """Bytes; infinite where the system has no such limit."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):  # not Linux
        return float("inf")
    return disk.f_bavail * disk.f_frsize


def tensor_bytes(value: Any) -> int:
    """Bytes of shared memory that the tensors in nested dictionaries, lists and tuples take."""
    if isinstance(value, Tensor):
        return PAGE * (2 + value.numel() * value.element_size() // PAGE)
    if isinstance(value, dict | list | tuple):
        return sum(map(tensor_bytes, value.values() if isinstance(value, dict) else value))
    return 0
