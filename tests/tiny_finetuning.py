"""A data set that a tiny detector learns in seconds, and what it takes to learn it. Shared by the tests of fine-tuning,
evaluation and prediction."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from siamese_detr.training.finetune import FinetuneResult, finetune

CLASSES = ("stripes", "dots")


def write_scenes(folder: Path, count: int = 8, size: tuple[int, int] = (120, 96), seed: int = 0) -> Path:
    """``count`` JPEGs of textured boxes on a noisy background, and their COCO JSON beside the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    images, annotations = [], []
    width, height = size
    for n in range(count):
        picture = random.normal(110, 12, (height, width, 3)) + np.linspace(-30, 30, width)[None, :, None]
        side = int(random.integers(38, 60))
        x, y = int(random.integers(0, width - side)), int(random.integers(0, height - side))
        rows, columns = np.mgrid[:side, :side]
        texture = (columns // 5 % 2) if n % 2 == 0 else ((rows - 6) % 14 - 7) ** 2 + ((columns - 6) % 14 - 7) ** 2 < 20
        ink = np.array([230, 60, 40]) if n % 2 == 0 else np.array([40, 80, 240])
        picture[y : y + side, x : x + side] = np.where(texture[..., None], ink, 245) + random.normal(
            0, 6, (side, side, 3)
        )
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.jpg", quality=92)
        images.append({"id": n, "file_name": f"{n}.jpg", "width": width, "height": height})
        box = [x, y, side, side]
        annotations.append(
            {"id": n, "image_id": n, "category_id": 5 + n % 2, "bbox": box, "area": side * side, "iscrowd": 0}
        )
    labels = folder.with_suffix(".json")
    categories = [{"id": 5 + k, "name": name} for k, name in enumerate(CLASSES)]
    labels.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return labels


TINY: dict[str, Any] = {
    "num_queries": 12,
    "hidden_size": 64,
    "heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "ffn_size": 128,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
QUICK: dict[str, Any] = {
    **{
        "batch_size": 4,
        "image_size": 96,
        "square": True,
        "crop": 0.0,
        "workers": 0,
        "device": "cpu",
        "progress": False,
        "pages": False,
    },
    **{"lr": 1e-3, "backbone_lr": 0.0, "schedule": "constant", "clip": 0.5, "log_every": 1},
}


@functools.cache
def learned() -> tuple[FinetuneResult, Path]:
    """A detector that has learnt eight scenes by heart, and its labels: made once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="siamese-detr-test-"))
    labels = write_scenes(folder / "scenes")
    result = finetune(
        train=str(labels), val=str(labels), out=str(folder / "run"), steps=60, eval_every=15, **TINY, **QUICK
    )
    return result, labels
