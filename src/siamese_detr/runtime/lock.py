"""Exclusion: never two processes that write into one directory."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from siamese_detr.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: two runs in one directory are not detected there
    fcntl = None  # type: ignore[assignment]


class Locked(UserError):
    """Another process holds the directory."""


@contextlib.contextmanager
def locked(directory: Path, patience: float = 0.0) -> Iterator[None]:
    """Context that holds a directory, made if need be, for this process.

    A POSIX record lock: the kernel frees it when the process ends, however it ends, and children do not inherit it.

    Args:
        directory: to hold, by its file ``.lock``.
        patience: seconds to wait for another process that holds it.

    Raises:
        Locked: another process still holds it.
        UserError: it cannot be written, or its file system has no locks.
    """
    path, deadline = directory / ".lock", time.monotonic() + patience
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"cannot write into {directory}: {error.strerror}; choose another directory") from error
    try:
        while fcntl is not None:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"{path} cannot be locked ({error.strerror}): the file system must support POSIX locks, or two "
                        "runs could write into one directory; choose a place on another"
                    ) from error
                if time.monotonic() >= deadline:
                    holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip()
                    raise Locked(
                        f"another run ({holder or 'unknown'}) is writing into {directory}: wait for it, or use another"
                    ) from error
                time.sleep(0.1)
        if fcntl is not None:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
