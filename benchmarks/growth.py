"""How costs grow with the number of images, and what a bank of features costs.

    python benchmarks/growth.py [--photos 8] [--rows 5000] [--samples 32] [--out benchmarks/results]

With 1, 4 and 16 times as many images: CPU time per image of ``propose``, CPU time per training sample, and what a run
does before its first step (list the images, open the store, select its rows, plan the batches). The start-up is
measured on stores of images that do not exist (but for an empty first one), so that it cannot read them. Then a
feature bank as in the recipe ``laptop``: its bytes and its CPU time per entry, and what reading it back costs against
fresh views. All CPU time, of all processes, with one thread. Prints the figures and writes growth.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from data_path import shipped_photos
from siamese_detr.images import list_images
from siamese_detr.proposals.propose import propose
from siamese_detr.proposals.shard import StoredImage, StoreSettings
from siamese_detr.proposals.store import ProposalStore, Selection
from siamese_detr.proposals.writer import writing
from siamese_detr.runtime.processes import Team
from siamese_detr.training.pretrain import build
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.training.source import Source, find_source
from siamese_detr.views.batch import prepare
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.sampler import ViewBatchSampler
from siamese_detr.views.two_views import TwoViewDataset, collate

FACTORS = (1, 4, 16)


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(action: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    """CPU seconds of an action, and its result."""
    start = cpu_seconds()
    result = action(*arguments, **options)
    return cpu_seconds() - start, result


def images_and_samples(folder: Path, photos: int, samples: int) -> dict[str, Any]:
    """CPU milliseconds per image of `propose` and per training sample, by number of images."""
    config, rows = ViewConfig(), {}
    for factor in FACTORS:
        images = folder / f"photos-{factor}"
        images.mkdir()
        shipped_photos(images, photos * factor)
        store_directory = str(folder / f"store-{factor}")
        spent, _ = timed(propose, images=str(images), out=store_directory, workers=1)
        store = ProposalStore.open(store_directory)
        dataset = TwoViewDataset(store, config, 0)
        batches = list(ViewBatchSampler(store, config, 4, samples // 4 + 1, 0))
        read_batches(dataset, batches[:1])
        sampled, _ = timed(read_batches, dataset, batches[1:])
        rows[str(photos * factor)] = {
            "propose, ms per image": 1e3 * spent / (photos * factor),
            "data, ms per sample": 1e3 * sampled / (len(batches[1:]) * 4),
        }
    return rows


def read_batches(dataset: TwoViewDataset, batches: list[list[tuple[int, int]]]) -> None:
    """Everything between the files and the detector."""
    for keys in batches:
        prepare(collate([dataset[key] for key in keys]), (0.5,) * 3, (0.25,) * 3)


def begin(directory: Path, listed: Path, config: ViewConfig) -> int:
    """What a run does before its first batch; the number of its images."""
    store = ProposalStore.open(directory)
    chosen = Selection(store, store.select(list_images(str(listed))))
    TwoViewDataset(chosen, config, 0)
    next(iter(ViewBatchSampler(chosen, config, 256, 300_000, 0)))
    return len(chosen)


def start_up(folder: Path, rows: int) -> dict[str, Any]:
    """CPU seconds before the first batch is asked for, by number of images, which do not exist."""
    boxes, scores = np.tile(np.float32([10, 20, 200, 180]), (20, 1)), np.linspace(1, 0.1, 20, dtype=np.float32)
    config, figures = ViewConfig(), {}
    for factor in FACTORS:
        names = [f"n{number // 1300:05d}/{number:08d}.jpg" for number in range(rows * factor)]
        (folder / names[0]).parent.mkdir(exist_ok=True)
        (folder / names[0]).touch()  # of a list, a few files must exist
        listed = folder / f"list-{factor}.txt"
        listed.write_text("\n".join(names) + "\n")
        directory = folder / f"generated-{factor}"
        with writing(directory, StoreSettings("edge-boxes", {"max_boxes": 20}, str(folder))) as writer:
            for number, name in enumerate(names):
                writer.add(StoredImage(name, 500, 375 + number % 100, boxes, scores))
        spent, found = timed(begin, directory, listed, config)
        assert found == len(names)
        figures[str(rows * factor)] = {"start-up, ms": 1e3 * spent, "us per image": 1e6 * spent / (rows * factor)}
    return figures


def feature_bank(folder: Path, photos: int) -> dict[str, Any]:
    """Cost per entry of a bank, and of reading it, against fresh views."""
    images, out = folder / f"photos-{max(FACTORS)}", folder / "run"
    given = {"images": str(images), "out": str(out), "proposals": str(folder / f"store-{max(FACTORS)}")}
    sizes = {"hidden_size": 128, "encoder_layers": 3, "decoder_layers": 3, "ffn_size": 512, "num_queries": 50}
    views = {"view_size": 192, "crop_size": 96, "num_regions": 5, "feature_bank": 2, "batch_size": 4, "workers": 0}
    config = PretrainConfig(**given, **sizes, **views, progress=False)  # type: ignore[arg-type]
    store = ProposalStore.open(given["proposals"])
    rows = np.arange(len(store))
    dataset = TwoViewDataset(store, config.views(), 0)
    pretext = build(config)
    team = Team(PartialState(cpu=True))
    filled, bank = timed(find_source, config, pretext, dataset, team)
    config.feature_bank = 0
    fresh = find_source(config, pretext, dataset, team)
    keys = [[(epoch, int(row)) for row in part] for epoch in (0, 1) for part in np.array_split(rows, len(rows) // 4)]

    read_bank, _ = timed(read_source, bank, keys)
    read_fresh, _ = timed(read_source, fresh, keys)
    entries = 2 * len(rows)
    return {
        "entries": entries,
        "kilobytes per entry": bank.dataset.kinds["entries"].itemsize / 1e3,  # type: ignore[attr-defined]
        "fill, ms per entry": 1e3 * filled / entries,
        "read back, ms per entry": 1e3 * read_bank / entries,
        "fresh, ms per entry": 1e3 * read_fresh / entries,
    }


def read_source(source: Source, batches: list[list[tuple[int, int]]]) -> None:
    """The features of all batches."""
    for keys in batches:
        source.freeze(source.collate([source.dataset[key] for key in keys]))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    started = time.perf_counter()
    summary: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        summary["images"] = images_and_samples(folder, options.photos, options.samples)
        summary["start-up"] = start_up(folder, options.rows)
        summary["feature bank"] = feature_bank(folder, options.photos)
    summary["wall seconds"] = time.perf_counter() - started
    print(json.dumps(summary, indent=2))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "growth.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
