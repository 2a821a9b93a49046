"""A bank of frozen features: the backbone sees K view sets of each image once; training costs the Transformer alone.

For small collections and machines without an accelerator. A bank is a directory of flat arrays, memory-mapped: half
precision maps and crop features, single precision boxes, one byte per entry that says whether it is there. Its name is
a hash of everything it was made from. Views must have one size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from siamese_detr.errors import UserError, too_many_unreadable
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.runtime.loading import Loader
from siamese_detr.runtime.processes import machine_explained
from siamese_detr.views.two_views import TwoViewDataset, collate

FORMAT = 3
"""Part of a bank's name: raised when views or features are computed otherwise, so that no older bank is used."""
PRESENT = 1
"""State of an entry that is there."""
FLUSH_EVERY = 32
"""Batches after which entries are forced to the disk and only then marked as present."""


def fingerprint(dataset: TwoViewDataset, **facts: Any) -> str:
    """Hash of all a bank's content depends on.

    Args:
        dataset: the images, their sizes and proposals; decides the views (its configuration and seed).
        facts: further JSON values: backbone checksum and configuration, normalisation, crop size.
    """
    digest = hashlib.sha256()
    views = dataclasses.asdict(dataset.config)
    digest.update(json.dumps([FORMAT, views, dataset.seed, facts], sort_keys=True, default=str).encode())
    for index in range(len(dataset)):
        row = dataset.store.row(index)
        digest.update(f"{row.path}\0{row.width}x{row.height}\0".encode(errors="surrogateescape"))
        digest.update(np.ascontiguousarray(row.boxes).tobytes())
        digest.update(np.ascontiguousarray(row.scores).tobytes())  # regions may be drawn by them
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes of one entry (one image's views).

    Args:
        maps: (V, C, h, w) of each level.
        crops: (V, P, C), or None if the task needs none.
        boxes: (V, P, 4).
    """

    maps: tuple[tuple[int, ...], ...]
    crops: tuple[int, ...] | None
    boxes: tuple[int, ...]

    @classmethod
    def of(cls, features: FrozenFeatures) -> Layout:
        """The layout of features of a batch of one."""
        views = features.views
        return cls(
            maps=tuple((views, *level.shape[1:]) for level in features.maps),
            crops=None if features.crop_features is None else (views, *features.crop_features.shape[2:]),
            boxes=(views, *features.boxes.shape[2:]),
        )

    def arrays(self) -> dict[str, tuple[tuple[int, ...], type]]:
        """Name -> (shape, type) of an entry's arrays."""
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            f"maps{i}": (shape, np.float16) for i, shape in enumerate(self.maps)
        }
        if self.crops is not None:
            arrays["crops"] = (self.crops, np.float16)
        return arrays | {"boxes": (self.boxes, np.float32), "query_boxes": (self.boxes, np.float32)}

    @property
    def entry_bytes(self) -> int:
        """Bytes of one entry."""
        return sum(int(np.prod(shape)) * np.dtype(kind).itemsize for shape, kind in self.arrays().values())


class FeatureBank(Dataset[dict[str, Any]]):
    """An open bank; ``bank[(epoch, image)]`` gives the entry that the image has in that epoch (number epoch mod K).

    Args:
        directory: of this bank.
        layout: shapes of an entry.
        images: number of images.
        sets: K, view sets per image.
        view_size: side of the square views, pixels.
    """

    def __init__(self, directory: Path, layout: Layout, images: int, sets: int, view_size: int) -> None:
        self.directory, self.layout, self.images, self.sets = directory, layout, images, sets
        self.view_size = view_size
        self._arrays: dict[str, np.memmap] | None = None

    def __len__(self) -> int:
        return self.images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # data workers map the files themselves

    @property
    def entries(self) -> int:
        """Entries in all: images x K."""
        return self.images * self.sets

    @property
    def bytes(self) -> int:
        """Size on the disk."""
        return self.entries * (self.layout.entry_bytes + 1)

    @property
    def arrays(self) -> dict[str, np.memmap]:
        """The mapped arrays (entries, ...), and ``state`` (entries,)."""
        if self._arrays is None:
            kinds = self.layout.arrays() | {"state": ((), np.uint8)}
            self._arrays = {
                name: np.memmap(self.directory / name, kind, "r+", shape=(self.entries, *shape))
                for name, (shape, kind) in kinds.items()
            }
        return self._arrays

    def slot(self, epoch: int, image: int) -> int:
        """Where the entry of an image in an epoch is."""
        return epoch % self.sets * self.images + image

    def key(self, slot: int) -> tuple[int, int]:
        """(number of the view set, image) of an entry: the key of the data set it is made from."""
        return divmod(slot, self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        slot = self.slot(*key)
        if self.arrays["state"][slot] != PRESENT:
            return {"row": key[1]}
        return {name: np.asarray(self.arrays[name][slot]) for name in self.layout.arrays()}

    def create(self) -> None:
        """Reserve the files, if they are not there.

        Raises:
            UserError: the disk has no room for them.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sizes = {
                name: self.entries * int(np.prod(shape)) * np.dtype(kind).itemsize
                for name, (shape, kind) in (self.layout.arrays() | {"state": ((), np.uint8)}).items()
            }
            missing = sum(size for name, size in sizes.items() if not (self.directory / name).exists())
            self._check(sizes)
            free = shutil.disk_usage(self.directory).free
            if missing > free:
                raise UserError(
                    f"the feature bank needs {missing / 1e9:.2f} GB in {self.directory.parent}, where {free / 1e9:.2f} "
                    "GB are free: lower feature_bank or view_size, or name another place with bank_dir"
                )
            for name, size in sizes.items():
                with open(self.directory / name, "ab") as file:
                    # Real blocks, now: a mapped write that finds the disk full would kill the process.
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), 0, max(size, 1))
                    else:
                        os.ftruncate(file.fileno(), max(size, 1))
        except OSError as error:
            raise UserError(f"cannot write the feature bank {self.directory}: {error.strerror}") from error

    def _check(self, sizes: dict[str, int]) -> None:
        """Refuse a bank of which files were lost or cut: made anew they would be zeros that count as features."""
        state = self.directory / "state"
        if not state.exists() or not np.fromfile(state, np.uint8).any():
            return
        for name, size in sizes.items():
            file = self.directory / name
            found = file.stat().st_size if file.exists() else 0
            if found != max(size, 1):
                raise UserError(
                    f"the feature bank {self.directory} is damaged ({name} has {found} bytes instead of {size}): "
                    "remove that directory, and it is computed again"
                )

    def missing(self) -> np.ndarray:
        """Entries not yet computed, also those of images that could not be read: they may have been mended."""
        return np.flatnonzero(self.arrays["state"] != PRESENT)

    def put(self, slots: Sequence[int], features: FrozenFeatures) -> None:
        """Write the entries of a batch; they count once :meth:`commit` has marked them."""
        views = features.views
        values = {f"maps{i}": level.unflatten(0, (views, -1)).transpose(0, 1) for i, level in enumerate(features.maps)}
        values |= {"boxes": features.boxes.transpose(0, 1), "query_boxes": features.query_boxes.transpose(0, 1)}
        if features.crop_features is not None:
            values["crops"] = features.crop_features.transpose(0, 1)
        for name, value in values.items():
            half = self.arrays[name].dtype == np.float16
            self.arrays[name][slots] = value.to("cpu", torch.float16 if half else torch.float32).numpy()

    def commit(self, slots: Sequence[int]) -> None:
        """Force what was written to the disk, then mark the entries as present."""
        for name, array in self.arrays.items():
            if name != "state":
                array.flush()
        self.arrays["state"][np.asarray(slots, np.int64)] = PRESENT
        self.arrays["state"].flush()

    def collate(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Entries -> a batch of tensors; images that could not be read are left out and listed."""
        good = [entry for entry in entries if "row" not in entry]
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.stack([entry[name] for entry in good]))
            if good
            else torch.zeros(0, *shape, dtype=torch.float16 if kind is np.float16 else torch.float32)
            for name, (shape, kind) in self.layout.arrays().items()
        }
        bad = [entry["row"] for entry in entries if "row" in entry]
        return batch | {"skipped": [self._failure(row) for row in bad]}

    def _failure(self, row: int) -> tuple[str, str]:
        for record in reversed(JsonLines(self.directory / "failures.jsonl").read()):
            if record.get("row") == row:
                return record["path"], record["reason"]
        return f"row {row}", "its features were not computed"

    def features(self, batch: dict[str, Tensor]) -> FrozenFeatures:
        """What the pretext task takes, from a batch on its device."""
        maps = [batch[f"maps{i}"].transpose(0, 1).flatten(0, 1).float() for i in range(len(self.layout.maps))]
        images = maps[0].shape[0]
        side = self.view_size
        return FrozenFeatures(
            maps=maps,
            pixel_mask=torch.ones(images, side, side, dtype=torch.bool, device=maps[0].device),
            sizes=torch.full((images, 2), side, dtype=torch.int64, device=maps[0].device),
            boxes=batch["boxes"].transpose(0, 1),
            query_boxes=batch["query_boxes"].transpose(0, 1),
            crop_features=batch["crops"].transpose(0, 1).float() if "crops" in batch else None,
        )


def fill(
    bank: FeatureBank,
    dataset: TwoViewDataset,
    slots: np.ndarray,
    freeze: Callable[[dict[str, Any]], FrozenFeatures],
    batch_size: int,
    workers: int,
    max_bad_share: float,
    track: Callable[[Iterable[Any], int], Iterable[Any]] = lambda batches, total: batches,
) -> None:
    """Compute entries; a kill loses no more than the last :data:`FLUSH_EVERY` batches.

    Args:
        bank: created.
        dataset: what the bank was fingerprinted with.
        slots: the entries that this process computes.
        freeze: batch of views -> features.
        batch_size: images at a time.
        workers: data processes.
        max_bad_share: largest share of unreadable images that the run tolerates, 0 to 1.
        track: wraps the batches to show progress.

    Raises:
        UserError: more images cannot be read; what was computed is kept.
    """
    of_set = slots // len(bank)
    # A batch holds entries of one view set only: then its images tell them apart.
    batches = [
        members[first : first + batch_size].tolist()
        for number in range(bank.sets)
        for members in [slots[of_set == number]]
        for first in range(0, len(members), batch_size)
    ]
    loader = Loader(dataset, [[bank.key(slot) for slot in batch] for batch in batches], collate, workers)
    failures = JsonLines(bank.directory / "failures.jsonl")
    told = {record.get("row"): record.get("reason") for record in failures.read()}
    written: list[int] = []
    unreadable: set[int] = set()
    with machine_explained("continue with --resume"):
        for number, (members, batch) in enumerate(zip(batches, track(loader, len(batches)), strict=True)):
            slot_of = {bank.key(slot)[1]: slot for slot in members}
            present = [slot_of.pop(row) for row in batch["index"].tolist()]
            if present:
                bank.put(present, freeze(batch))
            written += present
            failed = [
                {"row": row, "path": path, "reason": reason}
                for row, (path, reason) in zip(slot_of, batch["skipped"], strict=True)
                if told.get(row) != reason
            ]
            failures.append(failed)
            told |= {record["row"]: record["reason"] for record in failed}
            unreadable |= slot_of.keys()
            if len(unreadable) > max_bad_share * len(bank):
                bank.commit(written)
                raise too_many_unreadable(len(unreadable), len(bank), failures.path, max_bad_share)
            if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                bank.commit(written)
                written = []
    bank.commit(written)
