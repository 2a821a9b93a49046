"""Errors that the user can fix: one line each, naming the file and the remedy."""

from __future__ import annotations

from pathlib import Path


class UserError(Exception):
    """A mistake in the user's input. The command line prints it as one line, without a traceback, and exits with 2."""


class ImageError(UserError):
    """An image file that cannot be read.

    Args:
        path: the file.
        reason: what is wrong with it, in a few words.
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"cannot read image {path}: {reason}")
        self.path = str(path)
        self.reason = reason

    def __reduce__(self) -> tuple:
        # Exceptions travel between worker processes; the default reduction would call __init__ with one argument.
        return type(self), (self.path, self.reason)


def too_many_unreadable(found: int, seen: int, listed: Path, max_bad_share: float) -> UserError:
    """What a run ends with that could not read ``found`` of ``seen`` images, which the file ``listed`` names."""
    return UserError(
        f"{found} of {seen} images cannot be read (listed in {listed}), more than max_bad_share {max_bad_share}: is "
        "the disk still mounted? Else fix them, or raise it, and use --resume"
    )
