"""Where a pre-training run's features come from: fresh views through the frozen backbone, or a bank of stored ones."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PretrainedConfig

from siamese_detr.errors import UserError
from siamese_detr.pretext.base import Pretext
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.runtime.processes import Team, default_workers
from siamese_detr.training import feature_bank
from siamese_detr.training.feature_bank import FeatureBank
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.views.augment import prepare
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


def find_source(config: PretrainConfig, pretext: Pretext, dataset: TwoViewDataset, team: Team) -> Source:
    """Fresh views, or a bank of features, which is completed first."""
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
    bank = find_bank(config, pretext, dataset, team, freeze)
    return Source(bank, bank.collate, bank.features)


def find_bank(
    config: PretrainConfig,
    pretext: Pretext,
    dataset: TwoViewDataset,
    team: Team,
    freeze: Callable[[Any], FrozenFeatures],
) -> FeatureBank:
    """The complete bank of this run's features."""
    detector = pretext.detector
    device = team.state.device
    pretext.eval()

    def on_device(batch: dict[str, Any]) -> FrozenFeatures:
        return freeze({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    first = next((batch for n in range(len(dataset)) if len((batch := collate([dataset[0, n]]))["index"])), None)
    if first is None:
        raise UserError(f"none of the {len(dataset)} images of {config.images} can be read")
    name = feature_bank.fingerprint(
        dataset,
        backbone=checksum(detector.backbone),
        network=network_of(detector.config.backbone_config),
        normalisation=[detector.image_mean, detector.image_std],
        crop_size=config.crop_size if pretext.needs_crops else None,
    )
    parent = Path(config.bank_dir) if config.bank_dir else Path(config.out) / "feature_bank"
    assert config.view_size is not None
    layout = feature_bank.Layout.of(on_device(first))  # type: ignore[arg-type]
    sets = config.feature_bank
    bank = FeatureBank(parent / f"{name[:16]}-{sets}", layout, len(dataset), sets, config.view_size)
    if team.main:
        if not bank.directory.exists():
            size = f"{len(dataset)} images x {sets} view sets, {bank.bytes / 1e6:.0f} MB"
            print(f"feature bank: {size} in {bank.directory}", file=sys.stderr)
        bank.create()
    team.wait()
    slots = bank.missing()[team.rank :: team.size]
    team.wait()  # before any process adds entries: all divide the same ones
    workers = default_workers() if config.workers is None else config.workers
    feature_bank.fill(
        bank,
        dataset,
        slots,
        on_device,
        config.batch_size // (config.accumulate * team.size),  # as many as this process trains on at a time
        workers,
        config.max_bad_share,
        track=track if config.progress else untracked,
    )
    team.wait()
    pretext.train()
    return bank


def network_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a backbone's configuration says of its function: the same weights give other maps dilated, or others of
    them.
    """
    return {name: value for name, value in config.to_dict().items() if name != "transformers_version"}


def track(batches: Iterable[Any], total: int) -> Iterable[Any]:
    return rich.progress.track(batches, "feature bank", total, console=Console(stderr=True)) if total else batches


def untracked(batches: Iterable[Any], total: int) -> Iterable[Any]:
    return batches


def checksum(module: nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of a module's parameters and buffers but those named in ``without``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name in without:
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
