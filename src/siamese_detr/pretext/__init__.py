"""The self-supervised tasks: Siamese DETR, the two methods it is compared with, and k-means classes."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING

from siamese_detr import plugins
from siamese_detr.errors import UserError
from siamese_detr.pretext.config import ClustersConfig, DetRegConfig, PretextConfig, SiameseConfig, UpDetrConfig

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import DetectorAdapter
    from siamese_detr.pretext.base import Pretext

__all__ = [
    "PRETEXTS",
    "ClustersConfig",
    "DetRegConfig",
    "PretextConfig",
    "SiameseConfig",
    "UpDetrConfig",
    "build_pretext",
    "find_pretext",
    "is_pretext",
    "pretext_names",
]

GROUP = "siamese_detr.pretexts"
"""Entry points of this group are the methods of other packages; each names a configuration class."""
PRETEXTS: dict[str, type[PretextConfig]] = {
    "siamese": SiameseConfig,
    "up-detr": UpDetrConfig,
    "detreg": DetRegConfig,
    "clusters": ClustersConfig,
}
"""The built-in methods, by their configuration classes."""


def is_pretext(method: str) -> bool:
    """Whether there is such a method, built in or from a plug-in."""
    return method in PRETEXTS or method in plugins.load(GROUP)


def pretext_names() -> list[str]:
    """All methods, built in or from plug-ins."""
    return [*PRETEXTS, *plugins.load(GROUP)]


def find_pretext(method: str) -> type[PretextConfig]:
    """The configuration class of a method, built in or from a plug-in.

    Raises:
        UserError: there is no such method.
    """
    if not is_pretext(method):
        raise UserError(f"unknown method {method!r}; there are: {', '.join(pretext_names())}")
    return PRETEXTS.get(method) or plugins.load(GROUP)[method]


def build_pretext(method: str, detector: DetectorAdapter, config: PretextConfig | None = None) -> Pretext:
    """The pretext task of that name around ``detector``; ``config`` defaults to the method's own, the paper's values.

    Raises:
        UserError: there is no such method, or ``config`` belongs to another one.
    """
    kind = find_pretext(method)
    if config is not None and not isinstance(config, kind):
        raise UserError(f"method {method!r} takes a {kind.__name__}, not a {type(config).__name__}")
    return pkgutil.resolve_name(kind.task)(detector, config or kind())
