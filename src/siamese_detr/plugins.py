"""Components of other installed packages, found by their entry points (``name = "module:Class"``)."""

from __future__ import annotations

import functools
from importlib.metadata import entry_points
from typing import Any

from siamese_detr.errors import UserError


@functools.cache
def load(group: str) -> dict[str, Any]:
    """Name -> object of every entry point of a group such as ``siamese_detr.detectors``; imports their packages.

    Call it only for names that are not built in: a broken plug-in then disturbs nobody who does not use plug-ins.

    Raises:
        UserError: a plug-in cannot be imported, or two packages use one name.
    """
    loaded: dict[str, Any] = {}
    for point in entry_points(group=group):
        package = point.dist.name if point.dist is not None else point.value
        if point.name in loaded:
            raise UserError(f"package {package} adds {point.name!r} to {group} a second time; uninstall one of the two")
        try:
            loaded[point.name] = point.load()
        except Exception as error:  # whatever the other package's code raises
            raise UserError(
                f"package {package}: its plug-in {point.name!r} ({point.value}) cannot be loaded "
                f"({type(error).__name__}: {error}); update or uninstall that package"
            ) from error
    return loaded
