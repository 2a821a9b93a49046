"""The self-supervised tasks: Siamese DETR and the two methods it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from siamese_detr.detection.matching import NonFiniteError
from siamese_detr.errors import UserError
from siamese_detr.pretext.base import Pretext, PretextConfig, PretextOutput
from siamese_detr.pretext.detreg import DetRegConfig, DetRegPretext
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiameseConfig, SiamesePretext
from siamese_detr.pretext.up_detr import UpDetrConfig, UpDetrPretext

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import DetectorAdapter

__all__ = [
    "PRETEXTS",
    "DetRegConfig",
    "DetRegPretext",
    "FrozenFeatures",
    "NonFiniteError",
    "Pretext",
    "PretextConfig",
    "PretextOutput",
    "SiameseConfig",
    "SiamesePretext",
    "UpDetrConfig",
    "UpDetrPretext",
    "build_pretext",
]

PRETEXTS: dict[str, tuple[type[Any], type[Any]]] = {
    "siamese": (SiamesePretext, SiameseConfig),
    "up-detr": (UpDetrPretext, UpDetrConfig),
    "detreg": (DetRegPretext, DetRegConfig),
}
"""Method -> its module and its configuration."""


def build_pretext(method: str, detector: DetectorAdapter, config: PretextConfig | None = None) -> Pretext:
    """The pretext task of that name around ``detector``; ``config`` defaults to the method's own, the paper's values.

    Raises:
        UserError: no such method, or the configuration of another one.
    """
    if method not in PRETEXTS:
        raise UserError(f"unknown method {method!r}; there are: {', '.join(PRETEXTS)}")
    module, configuration = PRETEXTS[method]
    if config is not None and not isinstance(config, configuration):
        raise UserError(f"method {method!r} takes a {configuration.__name__}, not a {type(config).__name__}")
    return module(detector, config)
