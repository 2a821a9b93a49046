"""A bank of frozen features: the backbone sees K view sets of each image once; training costs the Transformer alone.

For small collections and machines without an accelerator. A bank is a directory of two flat files, memory-mapped:
``entries`` holds a record for each image and view set, ``state`` one byte that says whether it is there. Its name is a
hash of everything it was made from. Views must have one size.
"""

from __future__ import annotations

import dataclasses
import functools
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

FORMAT = 4
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


def per_image(features: FrozenFeatures) -> dict[str, Tensor]:
    """Features of B images by the names that a record has, each (B, V, ...): maps and crop features in half precision,
    boxes in single.
    """
    maps = {f"maps{i}": level.unflatten(0, (features.views, -1)).half() for i, level in enumerate(features.maps)}
    crops = {} if features.crop_features is None else {"crops": features.crop_features.half()}
    values = maps | crops | {"boxes": features.boxes.float(), "query_boxes": features.query_boxes.float()}
    return {name: value.transpose(0, 1).cpu() for name, value in values.items()}


class FeatureBank(Dataset[dict[str, Any]]):
    """A bank; ``bank[(epoch, image)]`` gives the entry that the image has in that epoch (number epoch mod K).

    Args:
        directory: of this bank; made if it is not there.
        features: of a batch of one image, which show what an entry looks like.
        images: number of images.
        sets: K, view sets per image.

    Raises:
        UserError: from :meth:`create`.
    """

    def __init__(self, directory: Path, features: FrozenFeatures, images: int, sets: int) -> None:
        self.directory, self.images, self.sets = directory, images, sets
        self.side = features.pixel_mask.shape[-1]
        entry = [(name, value.numpy().dtype, value.shape[1:]) for name, value in per_image(features).items()]
        self.kinds = {"entries": np.dtype(entry), "state": np.dtype(np.uint8)}

    def __len__(self) -> int:
        return self.images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "files"}  # workers map them themselves

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: self.images * self.sets * kind.itemsize for name, kind in self.kinds.items()}

    @functools.cached_property
    def files(self) -> dict[str, np.memmap]:
        """The mapped files, each (images x K,)."""
        return {name: np.memmap(self.directory / name, kind, "r+") for name, kind in self.kinds.items()}

    def key(self, slot: int) -> tuple[int, int]:
        """(number of the view set, image) of an entry: the key of the data set it is made from."""
        return divmod(slot, self.images)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, image = key
        slot = epoch % self.sets * self.images + image
        if self.files["state"][slot] != PRESENT:
            return {"row": image}
        entry = self.files["entries"][slot]
        return {name: entry[name] for name in self.kinds["entries"].fields or ()}

    def create(self) -> None:
        """Reserve the files, if they are not there.

        Raises:
            UserError: too little free disk space, or files of a bank were lost or cut: as zeros, new ones would
                count as features.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            state = self.directory / "state"
            begun = state.exists() and np.fromfile(state, np.uint8).any()
            missing = 0
            for name, size in self.sizes.items():
                there = file.stat().st_size if (file := self.directory / name).exists() else 0
                missing += max(0, size - there)
                if begun and there != size:
                    raise UserError(
                        f"the feature bank {self.directory} is damaged ({name} has {there} bytes instead of {size}): "
                        "remove that directory, and it is computed again"
                    )
            free = shutil.disk_usage(self.directory).free
            if missing > free:
                raise UserError(
                    f"the feature bank needs {missing / 1e9:.2f} GB in {self.directory.parent}, where {free / 1e9:.2f} "
                    "GB are free: lower feature_bank or view_size, or name another place with bank_dir"
                )
            for name, size in self.sizes.items():
                with open(self.directory / name, "ab") as stream:
                    # Real blocks, now: a mapped write that finds the disk full would kill the process.
                    reserve = os.posix_fallocate if hasattr(os, "posix_fallocate") else None
                    reserve(stream.fileno(), 0, size) if reserve else os.ftruncate(stream.fileno(), size)
        except OSError as error:
            raise UserError(f"cannot write the feature bank {self.directory}: {error.strerror}") from error

    def missing(self) -> np.ndarray:
        """Entries not yet computed, also those of images that could not be read: they may have been repaired."""
        return np.flatnonzero(self.files["state"] != PRESENT)

    def put(self, slots: Sequence[int], features: FrozenFeatures) -> None:
        """Write the entries of a batch; they count once :meth:`commit` has marked them."""
        for name, value in per_image(features).items():
            self.files["entries"][name][slots] = value.numpy()

    def commit(self, slots: Sequence[int]) -> None:
        """Force what was written to the disk, then mark the entries as present."""
        self.files["entries"].flush()
        self.files["state"][np.asarray(slots, np.int64)] = PRESENT
        self.files["state"].flush()

    def collate(self, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Entries -> a batch of tensors; images that could not be read are left out and listed."""
        good = [entry for entry in entries if "row" not in entry]
        blank = np.zeros(0, self.kinds["entries"])
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.stack([entry[name] for entry in good]) if good else blank[name])
            for name in blank.dtype.fields or ()
        }
        return batch | {"skipped": [self._failure(entry["row"]) for entry in entries if "row" in entry]}

    def _failure(self, row: int) -> tuple[str, str]:
        for record in reversed(JsonLines(self.directory / "failures.jsonl").read()):
            if record.get("row") == row:
                return record["path"], record["reason"]
        return f"row {row}", "its features were not computed"

    def features(self, batch: dict[str, Tensor]) -> FrozenFeatures:
        """What the pretext task takes, from a batch on its device."""
        values = {name: value.transpose(0, 1).float() for name, value in batch.items() if isinstance(value, Tensor)}
        maps = [value.flatten(0, 1) for name, value in values.items() if name.startswith("maps")]
        images, device = maps[0].shape[0], maps[0].device
        return FrozenFeatures(
            maps=maps,
            pixel_mask=torch.ones(images, self.side, self.side, dtype=torch.bool, device=device),
            sizes=torch.full((images, 2), self.side, dtype=torch.int64, device=device),
            boxes=values["boxes"],
            query_boxes=values["query_boxes"],
            crop_features=values.get("crops"),
        )


def fill(
    bank: FeatureBank,
    dataset: TwoViewDataset,
    slots: np.ndarray,
    freeze: Callable[[dict[str, Any]], FrozenFeatures],
    batch_size: int,
    workers: int,
    max_bad_share: float,
    track: Callable[[Sequence[Any]], Iterable[Any]] = iter,
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
        track: wraps the list of batches to show progress.

    Raises:
        UserError: more images cannot be read; what was computed is kept.
    """
    # A batch holds entries of one view set only: then its images tell them apart.
    of_set = [slots[slots // len(bank) == number].tolist() for number in range(bank.sets)]
    batches = [part[i : i + batch_size] for part in of_set for i in range(0, len(part), batch_size)]
    loader = Loader(dataset, [[bank.key(slot) for slot in batch] for batch in batches], collate, workers)
    failures = JsonLines(bank.directory / "failures.jsonl")
    reported = {record.get("row"): record.get("reason") for record in failures.read()}
    written: list[int] = []
    unreadable: set[int] = set()
    with machine_explained("continue with --resume"):
        for number, (members, batch) in enumerate(zip(track(batches), loader, strict=True)):
            slot_of = {bank.key(slot)[1]: slot for slot in members}
            present = [slot_of.pop(row) for row in batch["index"].tolist()]
            if present:
                bank.put(present, freeze(batch))
            written += present
            failed = [
                {"row": row, "path": path, "reason": reason}
                for row, (path, reason) in zip(slot_of, batch["skipped"], strict=True)
                if reported.get(row) != reason
            ]
            failures.append(failed)
            reported |= {record["row"]: record["reason"] for record in failed}
            unreadable |= slot_of.keys()
            if len(unreadable) > max_bad_share * len(bank):
                bank.commit(written)
                raise too_many_unreadable(len(unreadable), len(bank), failures.path, max_bad_share)
            if number % FLUSH_EVERY == FLUSH_EVERY - 1:
                bank.commit(written)
                written = []
    bank.commit(written)
