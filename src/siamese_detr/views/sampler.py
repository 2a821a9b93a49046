"""The order of samples: every image once per epoch, random, in batches of similar view sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from siamese_detr.errors import UserError
from siamese_detr.randomness import rng
from siamese_detr.views.config import ViewConfig
from siamese_detr.views.plan import view_sizes
from siamese_detr.views.two_views import Rows

_PERMUTATION, _BATCHES = 1 << 30, (1 << 30) + 1  # their own counters, beyond any sample's (epoch, index)
WINDOW = 64
"""Batches that are formed together."""


class ViewBatchSampler(Sampler[list[tuple[int, int]]]):
    """Yields ``total_batches`` lists of (epoch, image), for ``TwoViewDataset``.

    The permutations of all epochs are concatenated and cut into windows of up to 64 batches. In a window, samples are
    grouped by the size of their views, and the batches are shuffled (views of one size need no windows). The n-th batch
    is a pure function of seed, sizes, view configuration, batch size and n, so a longer run starts with the same
    batches as a shorter one. A batch may span two epochs. Memory: four bytes per image.

    Args:
        store: the images, with their sizes.
        config: decides the views' sizes.
        batch_size: samples per batch.
        total_batches: batches to yield.
        seed: the dataset's seed.
        start: batches to skip (a resumed run); costs only the permutations of the epochs in use.

    Raises:
        UserError: no images, or a batch size below 1.
    """

    def __init__(
        self,
        store: Rows,
        config: ViewConfig,
        batch_size: int,
        total_batches: int,
        seed: int,
        start: int = 0,
    ) -> None:
        self.store, self.config, self.seed = store, config, seed
        self.batch_size, self.total_batches, self.start = batch_size, total_batches, start
        self.num_images = len(store)
        if self.num_images == 0:
            raise UserError("there are no images to make views of: give a folder with readable images")
        if batch_size < 1:
            raise UserError(f"batch size must be at least 1, not {batch_size}")
        # Small data sets get small windows, so that few epochs mix in each.
        several = min(WINDOW, max(WINDOW // 4, self.num_images // batch_size))
        self.window = several if config.view_size is None else 1

    def __len__(self) -> int:
        return max(0, self.total_batches - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        permutations: dict[int, NDArray[np.int32 | np.int64]] = {}
        position = self.start
        while position < self.total_batches:
            window, offset = divmod(position, self.window)
            batches = self._window(window, permutations)
            for epochs, images in batches[offset : self.total_batches - window * self.window]:
                yield list(zip(epochs.tolist(), images.tolist(), strict=True))
                position += 1

    def _window(self, window: int, permutations: dict) -> list[tuple[NDArray[np.int64], NDArray]]:
        """The batches of a window as (epochs, images), in order of use."""
        count = self.window * self.batch_size
        stream = np.arange(window * count, (window + 1) * count, dtype=np.int64)
        epochs, places = np.divmod(stream, self.num_images)
        for epoch in list(permutations):
            if epoch < epochs[0]:
                del permutations[epoch]
        images = np.empty(count, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if epoch not in permutations:
                permutations[epoch] = self._permutation(epoch)
            here = epochs == epoch
            images[here] = permutations[epoch][places[here]]
        if self.window == 1:
            return [(epochs, images)]
        sizes = view_sizes(self.config, self.store.sizes(images), self.seed, epochs, images)
        groups = group_by_size(sizes, self.batch_size)
        order = rng(self.seed, _BATCHES, window).permutation(len(groups))
        return [(epochs[groups[i]], images[groups[i]]) for i in order]

    def _permutation(self, epoch: int) -> NDArray:
        permutation = np.arange(self.num_images, dtype=np.int32 if self.num_images < 2**31 else np.int64)
        rng(self.seed, _PERMUTATION, epoch).shuffle(permutation)
        return permutation


def group_by_size(sizes: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Divide n samples (a multiple of ``batch_size``) into groups of similar (height, width), as a k-d tree does.

    Args:
        sizes: (n, 2).
    Returns:
        n / batch_size arrays of positions.
    """
    extents = np.log(sizes)

    def divide(members: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if len(members) <= batch_size:
            return [members]
        axis = int(np.ptp(extents[members], axis=0).argmax())
        ordered = members[np.argsort(extents[members, axis], kind="stable")]
        half = (len(members) // batch_size + 1) // 2 * batch_size
        return divide(ordered[:half]) + divide(ordered[half:])

    return divide(np.arange(len(sizes)))
