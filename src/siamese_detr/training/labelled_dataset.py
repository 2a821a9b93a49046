"""Labelled images for fine-tuning: DETR's augmentation as one crop and one resize per image, counted randomness,
collation.

DETR's recipe is: flip; then, with equal odds, either resize to a random scale, or resize to 400–600, cut a random
window of 384–600 and resize that to a random scale. Composed, both are *one* rectangle of the original image and
*one* output size, so an image is resampled once, from a JPEG decoded no larger than needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale

from siamese_detr.detectors.functional import constant
from siamese_detr.errors import ImageError
from siamese_detr.images.decode import decoded_scale, read_image
from siamese_detr.images.labels import DetectionDataset, LabelledImage
from siamese_detr.randomness import rng
from siamese_detr.views.batch import valid_mask

# What separates the random streams that share (seed, epoch): sample augmentation and sample order.
AUGMENT, ORDER = 1, 2
MIN_CROP = 0.3
"""Least share of a side that the strong augmentation's crop keeps."""


@dataclass(frozen=True)
class InputSize:
    """What the detector's image processor does at evaluation.

    Args:
        shortest_edge: short side in pixels, or the side of the square.
        longest_edge: limit of the long side.
        square: stretch to a square.
    """

    shortest_edge: int
    longest_edge: int
    square: bool


@dataclass(frozen=True)
class TransformConfig:
    """How training images are cut and resized.

    Args:
        image_size: largest short side, or the side of the square.
        max_size: limit of the long side (not used for squares).
        min_size: smallest short side drawn (from image_size down in steps of 4 % of it); None: 60 % of image_size. The
            side of squares is drawn for whole batches, by the training task.
        square: stretch to image_size × image_size, as evaluation then does: no padding, one shape, the cheapest
            on a CPU.
        crop: probability of the random-size crop.
        flip: probability of the horizontal flip.
        colour_jitter: brightness, contrast and saturation factors are drawn from 1 ± this.
        strong: RT-DETR's augmentation in place of crop and colour_jitter, see :func:`strong_augmentation`.
    """

    image_size: int = 800
    max_size: int = 1333
    min_size: int | None = None
    square: bool = False
    crop: float = 0.5
    flip: float = 0.5
    colour_jitter: float = 0.1
    strong: bool = False


@dataclass(frozen=True)
class Cut:
    """One image's geometry: the rectangle (x1, y1, x2, y2) of the original taken, its output (height, width), and
    the flip."""

    rectangle: tuple[float, float, float, float]
    size: tuple[int, int]
    flip: bool


def short_sides(config: TransformConfig) -> list[int]:
    """The short sides training draws from: DETR's 480, 512, … 800 for image_size 800."""
    least = config.min_size or round(0.6 * config.image_size)
    return [*range(config.image_size, least - 1, -max(round(0.04 * config.image_size), 1))][::-1]


def resized(width: float, height: float, short_side: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the short side at ``short_side`` unless the long one would exceed ``max_size``."""
    scale = min(short_side / min(width, height), max_size / max(width, height))
    return max(round(height * scale), 1), max(round(width * scale), 1)


def draw_cut(width: int, height: int, config: TransformConfig, random: np.random.Generator) -> Cut:
    """Draw flip, crop and output size for an image of ``width`` × ``height`` pixels."""
    flip = bool(random.random() < config.flip)
    rectangle = (0.0, 0.0, float(width), float(height))
    if random.random() < config.crop:
        # DETR's numbers (scales 400/500/600, windows of 384–600) are for images of 800: keep the proportions at other
        # sizes.
        unit = config.image_size / 800
        scale = float(random.choice([400, 500, 600])) * unit / min(width, height)
        least, most = 384 * unit / scale, 600 * unit / scale
        w = random.uniform(min(least, width), min(most, width))
        h = random.uniform(min(least, height), min(most, height))
        x, y = random.uniform(0, width - w), random.uniform(0, height - h)
        rectangle = (x, y, x + w, y + h)
    else:
        w, h = float(width), float(height)
    if config.square:
        size = (config.image_size, config.image_size)
    else:
        size = resized(w, h, int(random.choice(short_sides(config))), config.max_size)
    return Cut(rectangle, size, flip)


def cut_image(image: np.ndarray, cut: Cut, original_size: tuple[int, int]) -> np.ndarray:
    """Apply ``cut`` to the image, (H, W, 3) uint8, that may have been decoded smaller than ``original_size``
    (width, height)."""
    fx, fy = decoded_scale(original_size, image.shape[1::-1])
    x1, y1, x2, y2 = cut.rectangle
    box = (x1 * fx, y1 * fy, min(x2 * fx, image.shape[1]), min(y2 * fy, image.shape[0]))
    taken = Image.fromarray(image).resize(cut.size[::-1], Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(taken)[:, ::-1] if cut.flip else np.asarray(taken))


def cut_boxes(boxes: np.ndarray, classes: np.ndarray, cut: Cut) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) xyxy px of the original → cxcywh in [0, 1] of the cut, with their classes.

    Boxes are clipped to the cut; those of less than one output pixel in width or height are dropped.
    """
    x1, y1, x2, y2 = cut.rectangle
    height, width = cut.size
    frame = np.array([x2 - x1, y2 - y1] * 2)
    corners = ((boxes.astype(np.float64) - [x1, y1, x1, y1]) / frame).clip(0, 1)
    if cut.flip:
        corners = corners[:, [2, 1, 0, 3]] * [-1, 1, -1, 1] + [1, 0, 1, 0]
    sides = corners[:, 2:] - corners[:, :2]
    keep = (sides * [width, height] >= 1).all(axis=1)
    centres = (corners[:, :2] + corners[:, 2:]) / 2
    return np.concatenate([centres, sides], axis=1)[keep].astype(np.float32), classes[keep]


def strong_augmentation(config: TransformConfig) -> v2.Compose:
    """RT-DETR's: distorted colours (probability 0.8), zooming out onto black up to fourfold (0.5), SSD's crop with some
    least overlap with a box (0.8), the flip, the size. Takes (pixels, {"boxes", "labels"})."""
    if config.square:
        size: v2.Transform = v2.Resize((config.image_size, config.image_size))
    else:
        size = v2.RandomShortestSize(short_sides(config), config.max_size)
    return v2.Compose(
        [
            v2.RandomPhotometricDistort(p=0.8),
            v2.RandomZoomOut(fill=0, p=0.5),
            v2.RandomApply([v2.RandomIoUCrop(min_scale=MIN_CROP)], p=0.8),
            v2.RandomHorizontalFlip(config.flip),
            size,
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
        ]
    )


@dataclass(frozen=True)
class LabelledSample:
    """One augmented image, or the reason why there is none.

    Args:
        pixels: (H, W, 3) uint8, or None for an unreadable file.
        boxes: (N, 4) float32, cxcywh in [0, 1] of this image.
        classes: (N,) int64.
        jitter: (3,) float32 factors for brightness, contrast, saturation.
        index: row of the data set.
        problem: (path, reason) when pixels is None.
    """

    pixels: np.ndarray | None
    boxes: np.ndarray
    classes: np.ndarray
    jitter: np.ndarray
    index: int
    problem: tuple[str, str] | None = None


def unreadable(error: ImageError, index: int) -> LabelledSample:
    """In place of an image that cannot be read."""
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.ones(3, np.float32)
    return LabelledSample(None, *nothing, index, (error.path, error.reason))


class TrainingImages(Dataset):
    """Augmented samples by ``(epoch, index)``: a pure function of the seed and these two, whoever asks, in whatever
    order."""

    def __init__(self, dataset: DetectionDataset, transform: TransformConfig, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __len__(self) -> int:
        return len(self.dataset.images)

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of the image of each path."""
        return {str(item.path): number for number, item in enumerate(self.dataset.images)}

    def __getitem__(self, key: tuple[int, int]) -> LabelledSample:
        epoch, index = key
        return self.sample(self.dataset.images[index], epoch, index)

    def sample(self, item: LabelledImage, epoch: int, index: int) -> LabelledSample:
        """The image, of number ``index``, as it is augmented in an epoch."""
        random = rng(self.seed, AUGMENT, epoch, index)
        wanted = ~np.asarray(item.crowd, bool)
        try:
            if self.transform.strong:
                return self._strongly(item, wanted, index, int(random.integers(2**62)))
            cut = draw_cut(item.width, item.height, self.transform, random)
            jitter = random.uniform(1 - self.transform.colour_jitter, 1 + self.transform.colour_jitter, 3)
            # Decode no larger than the cut needs: its rectangle must still hold at least the output's pixels.
            x1, y1, x2, y2 = cut.rectangle
            image = self._read(item, max(cut.size[1] / (x2 - x1), cut.size[0] / (y2 - y1)))
        except ImageError as error:
            return unreadable(error, index)
        boxes, classes = cut_boxes(item.boxes[wanted], item.classes[wanted], cut)
        pixels = cut_image(image, cut, (item.width, item.height))
        return LabelledSample(pixels, boxes, classes, jitter.astype(np.float32), index)

    def _read(self, item: LabelledImage, scale: float) -> np.ndarray:
        return read_image(item.path, min_side=math.ceil(min(scale, 1) * min(item.width, item.height)))

    def _strongly(self, item: LabelledImage, wanted: np.ndarray, index: int, seed: int) -> LabelledSample:
        image = self._read(item, self.transform.image_size / MIN_CROP / min(item.width, item.height))
        height, width = image.shape[:2]
        corners = item.boxes[wanted] * np.tile(decoded_scale((item.width, item.height), (width, height)), 2)
        boxes = tv_tensors.BoundingBoxes(corners.astype(np.float32), format="XYXY", canvas_size=(height, width))
        target = {"boxes": boxes, "labels": torch.from_numpy(item.classes[wanted])}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pixels, target = self._augmentation(tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target)
        # Of this picture's size, cxcywh in [0, 1].
        height, width = pixels.shape[-2:]
        cxcywh = v2.functional.convert_bounding_box_format(target["boxes"], new_format="CXCYWH").numpy()
        shares = cxcywh / np.array([width, height] * 2, np.float32)
        array = pixels.permute(1, 2, 0).contiguous().numpy()
        return LabelledSample(array, shares, target["labels"].numpy(), np.ones(3, np.float32), index)

    @cached_property
    def _augmentation(self) -> v2.Compose:
        return strong_augmentation(self.transform)


def collate(samples: Sequence[LabelledSample]) -> dict[str, Any]:
    """A batch, zero-padded right and below.

    Returns:
        images uint8 (B, 3, H, W); sizes int64 (B, 2) = valid (height, width); jitter float32 (B, 3);
        boxes float32 (B, T, 4) cxcywh in [0, 1] of the valid part, classes int64 (B, T), −1 where an image has fewer
        than T boxes;
        index int64 (B,); skipped: list of (path, reason) of unreadable images, which are left out.
        With no readable image at all B is 0.
    """
    good = [sample for sample in samples if sample.pixels is not None]
    sizes = np.array([sample.pixels.shape[:2] for sample in good], np.int64).reshape(-1, 2)  # type: ignore[union-attr]
    height, width = sizes.max(axis=0) if good else (1, 1)
    counts = [len(sample.classes) for sample in good]
    images = np.zeros((len(good), height, width, 3), np.uint8)
    boxes = np.zeros((len(good), max(counts, default=0), 4), np.float32)
    classes = np.full(boxes.shape[:2], -1, np.int64)
    for row, sample in enumerate(good):
        assert sample.pixels is not None
        images[row, : sizes[row, 0], : sizes[row, 1]] = sample.pixels
        boxes[row, : counts[row]] = sample.boxes
        classes[row, : counts[row]] = sample.classes
    return {
        "images": torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        "sizes": torch.from_numpy(sizes),
        "jitter": torch.from_numpy(np.array([s.jitter for s in good], np.float32).reshape(-1, 3)),
        "boxes": torch.from_numpy(boxes),
        "classes": torch.from_numpy(classes),
        "index": torch.tensor([sample.index for sample in good], dtype=torch.int64),
        "skipped": [sample.problem for sample in samples if sample.problem is not None],
    }


def repeat_factors(dataset: DetectionDataset, threshold: float) -> np.ndarray:
    """How often an epoch shows each image on average (repeat-factor sampling; LVIS, Gupta et al. 2019, appendix B).

    A class that the share f of the images has gets ``r = max(1, sqrt(threshold / f))``, an image the largest r of its
    classes, and 1 without any.

    Args:
        dataset: labelled images.
        threshold: the share of images below which a class counts as rare, 0 to 1.

    Returns:
        float64 (images,), at least 1.
    """
    present = np.zeros((len(dataset), len(dataset.class_names)), bool)
    for row, item in zip(present, dataset.images, strict=True):
        row[item.classes[~np.asarray(item.crowd, bool)]] = True
    factors = np.sqrt(threshold / present.mean(0).clip(1 / len(dataset)))
    return np.where(present, factors, 1.0).max(1, initial=1.0)


class EpochBatches:
    """Batches of ``(epoch, index)``: every epoch a new permutation of all images, batches running on across epochs.

    The order is a pure function of (seed, position): a resumed run begins where it was, and a longer run has the
    shorter one as its prefix. An image that an epoch has several times counts as of several epochs, so that its
    augmentation differs.

    Args:
        images: number of images.
        batch_size: images per batch, over all processes.
        batches: number of batches.
        seed: of the order.
        repeats: (images,) how often an epoch has each image on average; it is rounded up or down at random, so that
            every epoch is of the same length, the rounded sum. None: once.
    """

    def __init__(
        self, images: int, batch_size: int, batches: int, seed: int, repeats: np.ndarray | None = None
    ) -> None:
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        repeats = np.ones(images) if repeats is None else repeats
        self.epoch_size = round(repeats.sum())
        self.repeats = repeats * (self.epoch_size / repeats.sum())
        self.start = 0
        self._order: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, position: int) -> list[tuple[int, int]]:
        if not 0 <= position < self.batches:
            raise IndexError(position)
        keys: list[tuple[int, int]] = []
        while len(keys) < self.batch_size:
            epoch, offset = divmod(position * self.batch_size + len(keys), self.epoch_size)
            if self._order[0] != epoch:
                self._order = epoch, self._epoch(epoch)
            keys += self._order[1][offset : offset + self.batch_size - len(keys)]
        return keys

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The keys of an epoch, in its order."""
        random = rng(self.seed, ORDER, epoch)
        order = random.permutation(self.epoch_size)
        # Systematic sampling: an image is taken as often as a comb of unit distance hits its share of the line.
        ends = np.cumsum(self.repeats)
        ends[-1] = self.epoch_size
        counts = np.diff(np.floor(ends + random.random()).astype(np.int64), prepend=0)
        number = math.ceil(self.repeats.max()) * epoch
        keys = [(number + again, image) for image, count in enumerate(counts.tolist()) for again in range(count)]
        return [keys[n] for n in order]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return (self[position] for position in range(self.start, self.batches))


def jitter_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation of (B, 3, H, W) float images in [0, 1], by the (B, 3) factors; clamped to [0,
    1].

    Contrast is taken around mid-grey rather than the image's mean, which padding would shift.
    """
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    images = images * brightness
    images = (images - 0.5) * contrast + 0.5
    grey = rgb_to_grayscale(images)
    return (grey + (images - grey) * saturation).clamp(0, 1)


def prepare(batch: dict[str, Any], mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """On the device: jitter and normalise.

    Returns:
        pixel_values float32 (B, 3, H, W), zero in the padding, and pixel_mask bool (B, H, W), True = valid.
    """
    images = batch["images"]
    mask = valid_mask(batch["sizes"], *images.shape[-2:])
    values = jitter_colours(images.float() / 255, batch["jitter"])
    middle, spread = constant([mean, std], values.device, values.dtype).view(2, 3, 1, 1)
    values = (values - middle) / spread
    return values * mask[:, None], mask
