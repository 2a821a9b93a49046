"""Small real images and labels that any test may ask for."""

from __future__ import annotations

import json
import os
from pathlib import Path

# Before a library is imported that reads them: test processes side by side share the cores. Threads that waited for
# each other in a loop would slow down the other processes many times.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if side_by_side := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(side_by_side))))

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

if not torch.cuda.is_available():  # Triton interprets kernels there; it wants to know when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

slow = pytest.mark.skipif("SIAMESE_DETR_SLOW_TESTS" not in os.environ, reason="slow; set SIAMESE_DETR_SLOW_TESTS=1")


def textured(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A photo-like RGB picture: smooth noise of several scales, and a few shapes with edges."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cells in (3, 8, 24):
        noise = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), dtype=float) / 3
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for shape in (draw.rectangle, draw.ellipse, draw.rectangle):
        left, top = random.integers(0, width // 2), random.integers(0, height // 2)
        right, bottom = left + random.integers(width // 8, width // 2), top + random.integers(height // 8, height // 2)
        box = (left, top, right, bottom)
        shape([int(v) for v in box], fill=tuple(int(v) for v in random.integers(0, 256, 3)))
    return image.filter(ImageFilter.GaussianBlur(0.5))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of six textured JPEGs, ``0.jpg`` … ``5.jpg``, 160x120 or 120x160 pixels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for n in range(6):
        size = (160, 120) if n % 3 else (120, 160)
        textured(n, *size).save(folder / f"{n}.jpg", quality=90)
    return folder


@pytest.fixture
def coco(photos: Path) -> Path:
    """A COCO JSON beside the folder `photos` (found without naming it): six images, cat (id 3) and dog (id 7)."""
    images, annotations = [], []
    for n in range(6):
        width, height = (160, 120) if n % 3 else (120, 160)
        images.append({"id": 10 + n, "file_name": f"photos/{n}.jpg", "width": width, "height": height})
        for k in range(1 + n % 2):
            box = [10 + 5 * k, 20 + 5 * n, 40, 30]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 10 + n,
                    "category_id": 7 if (n + k) % 2 else 3,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    path = photos.parent / "labels.json"
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
