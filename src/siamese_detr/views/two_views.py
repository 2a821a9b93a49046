"""Samples and batches: decode a file once, cut its views from the decoded image, and collate views into batches.

This is all that data workers do. Crops, photometric augmentation and normalisation follow on the device
(:mod:`siamese_detr.views.batch`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from siamese_detr.errors import ImageError
from siamese_detr.images.decode import decoded_scale, read_image, reduction
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.views.batch import ViewBatch
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.photometric import PHOTOMETRIC
from siamese_detr.views.plan import SamplePlan, plan_sample
from siamese_detr.views.resample import one_thread, resize

STRIDE = 32
"""Stride of the coarsest feature map that the detectors use, pixels."""


class Rows(Protocol):
    """The part of a proposal store, or of a selection of its images, that views need."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> StoredImage: ...

    def index(self, path: str) -> int | None: ...

    def sizes(self, rows: np.ndarray | Sequence[int] | None = None) -> np.ndarray: ...


@dataclass(frozen=True)
class ViewSample:
    """One image's views.

    Attributes:
        images: uint8 (V, h, w, 3).
        plan: their rectangles and regions.
        index: row of the image in the store.
        failure: (path, reason) if the image could not be read; then there are no views.
    """

    images: NDArray[np.uint8] | None
    plan: SamplePlan | None
    index: int
    failure: tuple[str, str] | None = None


class TwoViewDataset(Dataset[ViewSample]):
    """Views of stored images, addressed by (epoch, index).

    Args:
        store: proposals with the paths and sizes of their images.
        config: how views are made.
        seed: of all randomness; a sample is a pure function of (seed, epoch, index).
    """

    def __init__(self, store: Rows, config: ViewConfig, seed: int) -> None:
        self.store, self.config, self.seed = store, config, seed

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, key: tuple[int, int]) -> ViewSample:
        """The sample of (epoch, row of the image). For an unreadable image, only its ``failure`` is set."""
        epoch, index = key
        row = self.store.row(index)
        plan = plan_sample(self.config, row, self.seed, epoch, index)
        try:
            image = read_image(row.path, min_side=_needed_side(row, plan))
            _check_size(row, image.shape[1], image.shape[0])
        except ImageError as error:
            return ViewSample(None, None, index, (error.path, error.reason))
        return ViewSample(cut_views(image, (row.width, row.height), plan), plan, index)


def cut_views(image: NDArray[np.uint8], original: tuple[int, int], plan: SamplePlan) -> NDArray[np.uint8]:
    """Cut the plan's views (V, h, w, 3) from an image (H, W, 3), which may have been decoded at a reduced scale.

    Cropping, resizing and mirroring are one antialiased bilinear resampling. The rectangle is not rounded to pixels, so
    that pixels and boxes agree.

    Args:
        original: (width, height) at full scale, to which the plan's rectangles refer.
    """
    height, width = image.shape[:2]
    scale = decoded_scale(original, (width, height))
    views = np.empty((len(plan.rectangles), *plan.size, 3), np.uint8)
    with one_thread():
        for view, rectangle in zip(views, plan.rectangles * np.tile(scale, 2), strict=True):
            view[:] = resize(image, np.clip(rectangle, 0, [width, height, width, height]), plan.size, plan.flip)
    return views


def collate(samples: Sequence[ViewSample]) -> ViewBatch:
    """Collate samples into one batch, views zero-padded right and bottom to the largest; unreadable ones are left out.

    A batch that needs padding is padded to multiples of :data:`STRIDE`. Otherwise the cells of a feature map that count
    as padding would depend on the sizes of the other samples. If no sample could be read, the batch has B = 0.
    """
    good = [(s.images, s.plan) for s in samples if s.images is not None and s.plan is not None]
    sizes = {plan.size for _, plan in good} or {(1, 1)}
    height, width = (max(side) for side in zip(*sizes, strict=True))
    if len(sizes) > 1:
        height, width = -(-height // STRIDE) * STRIDE, -(-width // STRIDE) * STRIDE
    num_views = len(good[0][0]) if good else 1
    # Memory is view-major, as the detector expects it, and channels last, so that whole rows of pixels are copied.
    images = np.zeros((num_views, len(good), height, width, 3), np.uint8)
    for b, (views, plan) in enumerate(good):
        images[:, b, : plan.size[0], : plan.size[1]] = views
    return ViewBatch(
        images=torch.from_numpy(images).permute(1, 0, 4, 2, 3),
        sizes=torch.tensor([[plan.size] * num_views for _, plan in good], dtype=torch.int64).reshape(-1, num_views, 2),
        boxes=torch.from_numpy(_stack([plan.boxes for _, plan in good], (0, num_views, 0, 4))),
        query_boxes=torch.from_numpy(_stack([plan.query_boxes for _, plan in good], (0, num_views, 0, 4))),
        photometric=_stack([plan.photometric for _, plan in good], (0, num_views, 1, len(PHOTOMETRIC))),
        padded=torch.tensor([plan.padded for _, plan in good], dtype=torch.int64),
        index=torch.tensor([s.index for s in samples if s.images is not None], dtype=torch.int64),
        skipped=[s.failure for s in samples if s.failure is not None],
    )


def _stack(arrays: list[NDArray[np.float32]], empty: tuple[int, ...]) -> NDArray[np.float32]:
    return np.stack(arrays) if arrays else np.zeros(empty, np.float32)


def _needed_side(row: StoredImage, plan: SamplePlan) -> int | None:
    """Shortest side of the decoded image from which no view has to be enlarged; None: decode at full scale."""
    extent = plan.rectangles[:, 2:] - plan.rectangles[:, :2]
    scale = float((np.array(plan.size[::-1]) / extent).max())
    return None if scale > 0.5 else max(1, math.ceil(min(row.width, row.height) * scale))


def _check_size(row: StoredImage, width: int, height: int) -> None:
    if reduction((row.width, row.height), (width, height)) is None:
        reason = (
            f"it is {width}x{height} but was {row.width}x{row.height} when proposals were computed; run propose again"
        )
        raise ImageError(row.path, reason)
