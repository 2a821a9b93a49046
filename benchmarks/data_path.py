"""The data path: CPU time per sample, ours against plain per-crop augmentation with Pillow.

    python benchmarks/data_path.py [--images DIR] [--count 48] [--rounds 7] [--out benchmarks/results]

Both paths take the same files, rectangles, boxes and photometric parameters, on one thread, in turn. The plain one does
everything in the worker, image by image and crop by crop, as the research codes do: decode, resize, cut each view,
cut and resize each crop, jitter, blur, to tensor, normalise. Ours decodes and cuts views in the worker, and does the
rest in batches (here on the same processor). Without a folder, ImageNet-sized JPEGs (500x375) are made from the
photographs that scikit-image ships. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as plain
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table

from siamese_detr.images import list_images, read_size
from siamese_detr.images.decode import read_image
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.views.batch import prepare
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.photometric import CONTRAST, GRAY, HUE, ORDER, ORDERS, SATURATION, SIGMA
from siamese_detr.views.plan import SamplePlan, plan_sample
from siamese_detr.views.sampler import ViewBatchSampler
from siamese_detr.views.two_views import TwoViewDataset, collate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 16


class Rows:
    """A proposal store in memory, with random boxes (their origin does not matter for speed)."""

    def __init__(self, paths: list[Path]) -> None:
        self.array = np.array([read_size(path) for path in paths])
        self.images = []
        for n, (path, (width, height)) in enumerate(zip(paths, self.array.tolist(), strict=True)):
            corners = np.random.default_rng(n).random((512, 2, 2)) * [width, height]
            boxes = np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)
            self.images.append(StoredImage(str(path), width, height, boxes, np.linspace(1, 0, 512, dtype=np.float32)))

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int) -> StoredImage:
        return self.images[index]

    def sizes(self, rows=None) -> np.ndarray:
        return self.array if rows is None else self.array[np.asarray(rows)]


def shipped_photos(folder: Path, count: int) -> list[Path]:
    """JPEGs of 500x375 and 375x500 cut from the photographs of scikit-image."""
    from skimage import data

    sources = [np.asarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee", "rocket")]
    random, paths = np.random.default_rng(0), []
    for n in range(count):
        image = Image.fromarray(sources[n % len(sources)])
        size = (500, 375) if n % 3 else (375, 500)
        scale = max(size[0] / image.width, size[1] / image.height) * random.uniform(1, 1.3)
        image = image.resize((round(image.width * scale) + 1, round(image.height * scale) + 1))
        left, top = (int(random.integers(0, b - a + 1)) for a, b in zip(size, image.size, strict=True))
        path = folder / f"{n:03d}.jpg"
        image.crop((left, top, left + size[0], top + size[1])).save(path, quality=90)
        paths.append(path)
    return paths


def plain_augment(image: Image.Image, parameters: np.ndarray) -> torch.Tensor:
    """Colour jitter, greyscale, blur, to tensor and normalise, for one picture."""
    order = int(parameters[ORDER])
    for operation in ORDERS[order] if order >= 0 else ():
        value = float(parameters[operation])
        if operation == HUE:
            image = plain.adjust_hue(image, value)
        elif operation == SATURATION:
            image = plain.adjust_saturation(image, value)
        elif operation == CONTRAST:
            image = plain.adjust_contrast(image, value)
        else:
            image = plain.adjust_brightness(image, value)
    if parameters[GRAY] > 0:
        image = plain.to_grayscale(image, 3)
    if parameters[SIGMA] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(parameters[SIGMA])))
    return plain.normalize(plain.to_tensor(image), list(MEAN), list(STD))


def plain_sample(row: StoredImage, config: ViewConfig, key: tuple[int, int]) -> tuple[list[torch.Tensor], SamplePlan]:
    """Both views and all crops of one image, each made on its own: views first, then the crops of each view."""
    plan = plan_sample(config, row, 0, *key)
    with Image.open(row.path) as file:
        image = file.convert("RGB")
    # The short side whose view size the plan has: the image is resized first, then cut.
    extent = plan.rectangles[:, 2:] - plan.rectangles[:, :2]
    enlarge = (np.array(plan.size[::-1]) / extent).min()
    base = (round(image.width * enlarge), round(image.height * enlarge))
    scale = np.tile(np.array(base) / image.size, 2)
    image = image.resize(base, Image.Resampling.BILINEAR)
    if plan.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    made, cut = [], []
    for v, rectangle in enumerate(plan.rectangles * scale):
        x0, y0, x1, y1 = rectangle
        if plan.flip:
            x0, x1 = base[0] - x1, base[0] - x0
        view = image.crop((round(x0), round(y0), round(x1), round(y1)))
        view = view.resize(plan.size[::-1], Image.Resampling.BILINEAR)
        cut.append(
            [
                view.crop(tuple(round(x) for x in box)).resize((128, 128), Image.Resampling.BILINEAR)
                for box in plan.boxes[v].tolist()
            ]
        )
        made.append(plain_augment(view, plan.photometric[v, 0]))
    for v, crops in enumerate(cut):
        made += [plain_augment(crop, plan.photometric[v, 1 + p]) for p, crop in enumerate(crops)]
    return made, plan


def plain_collate(samples: list[tuple[list[torch.Tensor], SamplePlan]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded views (2 * B, 3, H, W) and crops (2 * B * P, 3, 128, 128), view-major."""
    height, width = (max(plan.size[i] for _, plan in samples) for i in (0, 1))
    views = torch.zeros(2, len(samples), 3, height, width)
    for b, (made, plan) in enumerate(samples):
        for v in range(2):
            views[v, b, :, : plan.size[0], : plan.size[1]] = made[v]
    crops = torch.stack([torch.stack(made[2:]).unflatten(0, (2, -1)) for made, _ in samples], 1)
    return views.flatten(0, 1), crops.flatten(0, 2)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def compare(store: Rows, config: ViewConfig, rounds: int) -> dict:
    """CPU milliseconds per sample of each stage, and the ratios of every round."""
    dataset = TwoViewDataset(store, config, 0)
    batches = list(ViewBatchSampler(store, config, BATCH, rounds + 1, 0))
    times: dict[str, list[float]] = {name: [] for name in ("plain", "decode", "worker", "device")}
    difference: list[tuple[float, float]] = []
    for n, keys in enumerate(batches):
        clock = [time.process_time()]
        theirs = plain_collate([plain_sample(store.row(key[1]), config, key) for key in keys])
        clock.append(time.process_time())
        for _, index in keys:
            read_image(store.row(index).path)
        clock.append(time.process_time())
        batch = collate([dataset[key] for key in keys])
        clock.append(time.process_time())
        ours = prepare(batch, MEAN, STD)
        clock.append(time.process_time())
        if n == 0:  # the first round warms up, and shows that both make the same
            assert ours.crops is not None
            shown = ours.pixel_values[..., : theirs[0].shape[2], : theirs[0].shape[3]]  # ours pads to whole cells
            inside = ours.pixel_mask[:, None, : shown.shape[2], : shown.shape[3]].expand_as(shown)
            views = (shown - theirs[0]).abs()[inside]
            difference.append((float(views.mean()), float((ours.crops - theirs[1]).abs().mean())))
            continue
        for name, seconds in zip(times, np.diff(clock), strict=True):
            times[name].append(float(seconds) / len(keys) * 1e3)
    whole = [w + d for w, d in zip(times["worker"], times["device"], strict=True)]
    return {
        "ms_per_sample": {name: spread(values) for name, values in {**times, "worker + device": whole}.items()},
        "ratios": {
            "worker": spread([p / w for p, w in zip(times["plain"], times["worker"], strict=True)]),
            "whole path": spread([p / w for p, w in zip(times["plain"], whole, strict=True)]),
        },
        "mean difference, normalised units": {"views": difference[0][0], "crops": difference[0][1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of photos; made from shipped photographs if not given")
    parser.add_argument("--count", type=int, default=256, help="photos used")
    parser.add_argument("--rounds", type=int, default=7, help="batches of 16 measured")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if options.images:
            listed = list_images(options.images)
            paths = [listed.root / path for path in listed.paths[: options.count]]
        else:
            paths = shipped_photos(Path(temporary), options.count)
        store = Rows(paths)
        config = ViewConfig()
        summary = {
            "cpu": platform.processor() or platform.machine(),
            "images": len(paths),
            **compare(store, config, options.rounds),
        }
    console, table = Console(), Table("", "median", "min", "max", title="CPU ms per sample; ratios plain / ours")
    for part in ("ms_per_sample", "ratios"):
        for name, values in summary[part].items():
            table.add_row(name, *(f"{values[key]:.2f}" for key in ("median", "min", "max")))
    console.print(table)
    console.print("mean difference of the two paths' outputs:", summary["mean difference, normalised units"])
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "data_path.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
