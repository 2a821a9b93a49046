"""Stores in memory, for the tests of views."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from siamese_detr.proposals.shard import StoredImage
from siamese_detr.views.config import ViewConfig

SMALL = ViewConfig(short_sides=(96, 112, 128), max_size=160, num_regions=6)


@dataclass
class MemoryStore:
    """What the dataset needs of a proposal store, from a list."""

    images: list[StoredImage]

    def __len__(self) -> int:
        return len(self.images)

    def row(self, index: int) -> StoredImage:
        return self.images[index]

    def sizes(self, rows=None) -> np.ndarray:
        every = np.array([(image.width, image.height) for image in self.images])
        return every if rows is None else every[np.asarray(rows)]


@dataclass
class SizesOnly:
    """Sizes (n, 2) of images that do not exist."""

    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    def row(self, index: int) -> StoredImage:
        raise AssertionError("the sampler must not read rows")

    def sizes(self, rows=None) -> np.ndarray:
        return self.array[rows]


def stored(path: str | Path, width: int, height: int, count: int = 60, seed: int = 0) -> StoredImage:
    """A row of a store with random boxes, best first."""
    random = np.random.default_rng(seed)
    corners = random.random((count, 2, 2)) * [width, height]
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1).astype(np.float32)
    return StoredImage(str(path), width, height, boxes, np.sort(random.random(count).astype(np.float32))[::-1].copy())


def photo_store(photos: Path) -> MemoryStore:
    """Random proposals for a folder of photos."""
    images = []
    for n, path in enumerate(sorted(photos.iterdir())):
        width, height = Image.open(path).size
        images.append(stored(path, width, height, seed=n))
    return MemoryStore(images)
