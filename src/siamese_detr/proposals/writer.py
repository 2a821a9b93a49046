"""Adding rows to a proposal store."""

from __future__ import annotations

import time
from pathlib import Path

from filelock import FileLock, Timeout

from siamese_detr.errors import UserError
from siamese_detr.files import clean, write_text
from siamese_detr.proposals.shard import DamagedShard, Failure, Row, Shard, write_shard
from siamese_detr.proposals.store import META, ProposalStore, StoreSettings, shard_files


class StoreWriter:
    """Creates a store or continues one. A context manager; one writer per store at a time.

    Rows are kept in memory until a shard is full or ``flush_seconds`` old; a kill loses no more than that.

    Args:
        directory: the store; made if need be.
        settings: how the boxes are made; must agree with what is there.
        shard_size: most rows of one shard.
        flush_seconds: a shard is written after so long even if not full.

    Attributes:
        dropped: one line for each damaged shard that was removed on opening; its images count as missing again.

    Raises:
        UserError: other settings in the directory, another writer at work, or the directory cannot be written.
    """

    def __init__(
        self, directory: str | Path, settings: StoreSettings, shard_size: int = 4096, flush_seconds: float = 30.0
    ) -> None:
        self.directory = Path(directory).absolute()
        self.dropped: list[str] = []
        self._shard_size, self._flush_seconds = shard_size, flush_seconds
        self._rows: list[Row] = []
        self._failures: list[Failure] = []
        self._last_flush = time.monotonic()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.directory / ".lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.directory}: another propose is writing there; wait for it or choose another directory"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {self.directory}: {error.strerror}; choose another directory") from error
        try:
            self._begin(settings)
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, settings: StoreSettings) -> None:
        clean(self.directory)
        if (self.directory / META).exists():
            _require_same(self.directory, StoreSettings.read(self.directory), settings)
        elif shard_files(self.directory):
            raise UserError(f"{self.directory}: has shards but no {META}; delete it and run propose again")
        else:
            try:
                write_text(self.directory / META, settings.to_json())
            except OSError as error:
                raise _write_error(self.directory, error) from error
        self._drop_damaged()
        files = shard_files(self.directory)
        self._next = int(files[-1].stem.split("-")[1]) + 1 if files else 0

    def _drop_damaged(self) -> None:
        for file in shard_files(self.directory):
            try:
                Shard(file).verify()
            except DamagedShard as error:
                file.unlink()
                self.dropped.append(f"{file}: damaged ({error}); dropped, its images are computed again")

    def known(self) -> ProposalStore:
        """What the store holds now (without rows not yet written)."""
        return ProposalStore.open(self.directory)

    def forget_failures(self) -> None:
        """Drop the list of failed images, so that they are tried again."""
        for file in shard_files(self.directory):
            shard = Shard(file)
            if shard.failures:
                self._write(file, [shard.row(index) for index in range(shard.rows)], [])

    def add(self, row: Row) -> None:
        """Add the boxes of one image; ``row.path`` must be new and valid UTF-8."""
        self._rows.append(row)
        self._flush_if_due()

    def add_failure(self, path: str, reason: str) -> None:
        """Note that an image has no row."""
        self._failures.append(Failure(path, reason))
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        full = len(self._rows) + len(self._failures) >= self._shard_size
        if full or time.monotonic() - self._last_flush > self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been added as a shard, durably.

        Raises:
            UserError: the disk is full or the directory cannot be written; shards already there stay valid.
        """
        if self._rows or self._failures:
            self._write(self.directory / f"shard-{self._next:06d}.arrow", self._rows, self._failures)
            self._next += 1
            self._rows, self._failures = [], []
        self._last_flush = time.monotonic()

    def _write(self, file: Path, rows: list[Row], failures: list[Failure]) -> None:
        try:
            write_shard(file, rows, failures)
        except OSError as error:
            raise _write_error(self.directory, error) from error

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.flush()  # also after an interrupt or a failure elsewhere: what was computed is kept
        except UserError:
            if kind is None:
                raise  # else the error on its way tells more
        finally:
            self._lock.release()


def _require_same(directory: Path, there: StoreSettings, wanted: StoreSettings) -> None:
    differences = []
    if there.method != wanted.method:
        differences.append(f"method {there.method} (now {wanted.method})")
    if there.image_root != wanted.image_root and there.images_gone:
        # Another folder's images can join; but these are probably the same ones, moved, and would be computed twice.
        differences.append(f"images under {there.image_root}, which is gone (now {wanted.image_root})")
    if there.method == wanted.method:
        for key in sorted({*there.parameters, *wanted.parameters}):
            old, new = there.parameters.get(key), wanted.parameters.get(key)
            if old != new:
                differences.append(f"{key} {old} (now {new})")
    if differences:
        raise UserError(
            f"{directory}: the store there was made with {', '.join(differences)}; give the same, or another out "
            "directory"
        )


def _write_error(directory: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write to {directory}: {error.strerror or error}; free space or permissions, then run the same command "
        "again (finished shards are kept)"
    )
