"""Where a pre-training run's features come from: fresh views through the frozen backbone, or a bank of stored ones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from siamese_detr.errors import UserError
from siamese_detr.messages import say, track
from siamese_detr.pretext.base import Pretext
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.randomness import rng
from siamese_detr.runtime.processes import Team, default_workers
from siamese_detr.training.feature_bank import FeatureBank, fill, fingerprint
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.training.state import newest_checkpoint
from siamese_detr.views.batch import prepare
from siamese_detr.views.two_views import TwoViewDataset, collate

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Args:
        dataset: indexed by (epoch, number of the image).
        collate: its samples -> a batch.
        freeze: a batch on its device -> frozen features.
    """

    dataset: Dataset
    collate: Callable[[list[Any]], Any]
    freeze: Callable[[dict[str, Any]], FrozenFeatures]

    def samples(self, images: int, batch_size: int, device: torch.device) -> Iterator[FrozenFeatures]:
        """The features of the first epoch's views of all readable images, in a random order that is always the same."""
        order = rng(0).permutation(images).tolist()
        for start in range(0, images, batch_size):
            numbers = order[start : start + batch_size]
            batch = self.collate([self.dataset[(0, number)] for number in numbers])
            if len(batch["skipped"]) < len(numbers):
                yield self.freeze({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})


def find_source(config: PretrainConfig, pretext: Pretext, dataset: TwoViewDataset, team: Team, steps: int) -> Source:
    """Fresh views, or a bank of features, which is completed first; not for a run that has done all its ``steps``."""
    detector = pretext.detector
    crop_size = config.crop_size if pretext.needs_crops else None

    def freeze(batch: Any) -> FrozenFeatures:
        inputs = prepare(batch, detector.image_mean, detector.image_std, crop_size)
        # The backbone has the run's precision; a bank is computed in the best, whatever the runs that will use it.
        precision = AUTOCAST.get(config.precision) if not config.feature_bank else None
        with torch.autocast(inputs.pixel_values.device.type, precision, enabled=precision is not None):
            return pretext.frozen_features(inputs)

    if not config.feature_bank:
        return Source(dataset, collate, freeze)
    if config.resume and team.any(team.main and newest_checkpoint(config) == steps):
        return Source(dataset, collate, freeze)
    pretext.eval()
    bank = find_bank(config, pretext, dataset, team, freeze)
    pretext.train()
    return Source(bank, bank.collate, bank.features)


def find_bank(
    config: PretrainConfig,
    pretext: Pretext,
    dataset: TwoViewDataset,
    team: Team,
    freeze: Callable[[Any], FrozenFeatures],
) -> FeatureBank:
    """The complete bank of this run's features."""
    detector, sets = pretext.detector, config.feature_bank

    def on_device(batch: Any) -> FrozenFeatures:
        return freeze({k: v.to(team.device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    first = next((batch for n in range(len(dataset)) if len((batch := collate([dataset[0, n]]))["index"])), None)
    if first is None:
        raise UserError(f"none of the {len(dataset)} images of {config.images} can be read")
    # The same weights give other maps dilated, or others of them: the backbone's configuration counts, too.
    network = detector.config.backbone_config.to_dict()
    name = fingerprint(
        dataset,
        backbone=checksum(detector.backbone),
        network={key: value for key, value in network.items() if key != "transformers_version"},
        normalisation=[detector.image_mean, detector.image_std],
        crop_size=config.crop_size if pretext.needs_crops else None,
    )
    parent = Path(config.bank_dir) if config.bank_dir else Path(config.out) / "feature_bank"
    bank = FeatureBank(parent / f"{name[:16]}-{sets}", on_device(first), len(dataset), sets)
    if team.main:
        if not bank.directory.exists():
            size = f"{len(dataset)} images x {sets} view sets, {sum(bank.sizes.values()) / 1e6:.0f} MB"
            kept = config.keep_bank or config.bank_dir is not None
            until = "" if kept else ", until the run is done (--keep-bank keeps it)"
            say(f"feature bank: {size} in {bank.directory}{until}")
        bank.create()
    team.wait()
    slots = bank.missing()[team.rank :: team.size]
    team.wait()  # before any process adds entries: all divide the same ones

    def tracked(batches: Any) -> Any:
        return track(batches, "feature bank", len(batches)) if config.progress and len(batches) > 0 else batches

    workers = default_workers() if config.workers is None else config.workers
    batch_size = config.batch_size // (config.accumulate * team.size)  # what this process trains on at a time
    fill(bank, dataset, slots, on_device, batch_size, workers, config.max_bad_share, tracked)
    team.wait()
    return bank


def checksum(module: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of a module's parameters and buffers but those named in ``without``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
