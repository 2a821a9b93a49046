"""Adding images to a proposal store."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from siamese_detr.errors import ImageError, UserError
from siamese_detr.files import clean
from siamese_detr.proposals.shard import DamagedShard, Shard, StoredImage, StoreSettings, write_shard
from siamese_detr.proposals.store import ProposalStore, shard_files
from siamese_detr.runtime.lock import locked


@contextlib.contextmanager
def writing(
    directory: str | Path,
    settings: StoreSettings,
    shard_size: int = 4096,
    flush_seconds: float = 30.0,
    retry_failed: bool = False,
) -> Iterator[StoreWriter]:
    """Context that creates a store or continues one; one process per store at a time.

    Args:
        directory: the store; made if need be.
        settings: how the boxes are made; must agree with what is there.
        shard_size: most images of one shard.
        flush_seconds: a shard is written after so long even if not full.
        retry_failed: forget which images failed.

    Raises:
        UserError: other settings in the directory, another process at work, or the directory cannot be written.
    """
    directory = Path(directory).absolute()
    with locked(directory):
        writer = StoreWriter(directory, settings, shard_size, flush_seconds, retry_failed)
        try:
            yield writer
        except BaseException:
            with contextlib.suppress(UserError):  # the error on its way says more
                writer.flush()
            raise
        writer.flush()


class StoreWriter:
    """Images are kept in memory until a shard is full or old enough; a kill loses no more than that. See `writing`.

    Attributes:
        dropped: one line for each damaged shard that was removed on opening; its images count as missing again.
        known: what the store held then.
    """

    def __init__(
        self, directory: Path, settings: StoreSettings, shard_size: int, flush_seconds: float, retry_failed: bool
    ) -> None:
        self._directory, self._shard_size, self._flush_seconds = directory, shard_size, flush_seconds
        self._images: list[StoredImage] = []
        self._failures: dict[str, str] = {}
        self._last_flush = time.monotonic()
        self.dropped: list[str] = []
        clean(directory)
        for file in shard_files(directory):
            try:
                shard = Shard(file)
                _require_same(directory, shard.settings, settings)
                images = shard.images()
            except DamagedShard as error:
                file.unlink()
                self.dropped.append(f"{file}: damaged ({error.reason}); dropped, its images are computed again")
                continue
            if retry_failed and shard.failures:
                self._write(file, shard.settings, images, {})
        files = shard_files(directory)
        empty = ProposalStore(directory, settings, (), np.zeros(1, np.int64), {})
        self.known = ProposalStore.open(directory) if files else empty
        self._next = int(files[-1].stem.split("-")[1]) + 1 if files else 0

    def add(self, result: StoredImage | ImageError) -> None:
        """Add the boxes of one image, or why it has none; its path must be new, relative to the root, and Unicode.

        Raises:
            UserError: the disk is full or the directory cannot be written; shards already there stay valid.
        """
        if isinstance(result, StoredImage):
            self._images.append(result)
        else:
            self._failures[result.path] = result.reason
        full = len(self._images) + len(self._failures) >= self._shard_size
        if full or time.monotonic() - self._last_flush > self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been added as a shard, durably. Raises as :meth:`add`."""
        if self._images or self._failures:
            file = self._directory / f"shard-{self._next:06d}.arrow"
            self._write(file, self.known.settings, self._images, self._failures)
            self._next += 1
            self._images, self._failures = [], {}
        self._last_flush = time.monotonic()

    def _write(self, file: Path, settings: StoreSettings, images: list[StoredImage], failures: dict[str, str]) -> None:
        try:
            write_shard(file, settings, images, failures)
        except OSError as error:
            raise UserError(
                f"cannot write to {self._directory}: {error.strerror or error}; free disk space or change permissions, "
                "then run the same command again (finished shards are kept)"
            ) from error


def _require_same(directory: Path, there: StoreSettings, wanted: StoreSettings) -> None:
    differences = []
    if there.method != wanted.method:
        differences.append(f"method {there.method} (now {wanted.method})")
    else:
        for key in sorted({*there.parameters, *wanted.parameters}):
            old, new = there.parameters.get(key), wanted.parameters.get(key)
            if old != new:
                differences.append(f"{key} {old} (now {new})")
    if there.image_root != wanted.image_root and there.images_gone:
        # Another folder's images can join; but these are probably the same ones, moved, and would be computed twice.
        differences.append(f"images under {there.image_root}, which is gone (now {wanted.image_root})")
    if differences:
        raise UserError(
            f"{directory}: the store there was made with {', '.join(differences)}; give the same, or another out "
            "directory"
        )
