"""DETReg (Bar et al., CVPR 2022): find the object proposals without their positions as input, and embed them as the
frozen backbone does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from siamese_detr.pretext import heads, losses
from siamese_detr.pretext.base import Pretext, PretextOutput
from siamese_detr.pretext.config import DetRegConfig
from siamese_detr.pretext.features import FrozenFeatures

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, Memory


class DetRegPretext(Pretext):
    """One view; ordinary object queries; the object embedding is learned at the last decoder layer only.

    Objectness is scored by the softmax over {unused, object, no-object} that all pretext tasks share.

    Args:
        detector: the detector to pre-train.
        config: weights.
    """

    config: DetRegConfig

    def __init__(self, detector: DetectorAdapter, config: DetRegConfig | None = None) -> None:
        config = config or DetRegConfig()
        super().__init__(detector, config)
        self.region_head = heads.FeatureHead(detector.hidden_size, sum(detector.channels))

    def forward(self, features: FrozenFeatures) -> PretextOutput:
        """The losses of a batch of images with their proposals (whose number may differ: rows without area are
        padding).

        Raises:
            UserError: fewer queries than proposals, or features without crops.
            NonFiniteError: the predictions are NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        crops = features.crops()
        _, decoded = self.predict(features)
        matched = self.match(decoded, features)
        predicted = self.region_head(matched.states[-1:])
        with torch.autocast(predicted.device.type, enabled=False):
            embedding = losses.embedding_loss(predicted, crops, matched.valid, matched.counts)
        terms = matched.terms | {"loss_embedding": embedding}
        return self.weighted({"loss_embedding": self.config.embedding_weight}, terms)

    def predict(self, features: FrozenFeatures) -> tuple[Memory, Decoded]:
        """Decode the ordinary object queries."""
        memory = self.detector.encode(features.maps, features.pixel_mask)
        return memory, self.detector.decode(memory, self.detector.blank_queries(memory))
