"""UP-DETR (Dai et al., CVPR 2021): find random patches of the image, given their features, and reconstruct these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from siamese_detr.errors import UserError
from siamese_detr.pretext import heads, losses
from siamese_detr.pretext.base import Pretext, PretextOutput
from siamese_detr.pretext.config import UpDetrConfig
from siamese_detr.pretext.features import FrozenFeatures, region_of_query

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, Memory


class UpDetrPretext(Pretext):
    """One view; the queries of a patch see only each other in the decoder's self-attention.

    Args:
        detector: the detector to pre-train.
        config: weights.

    Raises:
        UserError: the detector's queries cannot be kept from each other.
    """

    config: UpDetrConfig

    def __init__(self, detector: DetectorAdapter, config: UpDetrConfig | None = None) -> None:
        config = config or UpDetrConfig()
        if not detector.masks_queries:
            raise UserError(
                f"{detector.family} cannot keep queries from each other, as UP-DETR does: use another method"
            )
        super().__init__(detector, config)
        channels = sum(detector.channels)
        self.region_embedding = nn.Linear(channels, detector.hidden_size)
        self.region_head = heads.FeatureHead(detector.hidden_size, channels)

    def forward(self, features: FrozenFeatures) -> PretextOutput:
        """The losses of a batch of images with their patches.

        Raises:
            UserError: fewer queries than patches, or features without crops.
            NonFiniteError: the predictions are NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        patches = features.crops()
        _, decoded = self.predict(features)
        matched = self.match(decoded, features)
        predicted = self.region_head(matched.states)
        with torch.autocast(predicted.device.type, enabled=False):
            rebuilt = losses.region_loss(predicted, patches, matched.valid, matched.counts)
        return self.weighted(
            {"loss_region": self.config.reconstruction_weight}, matched.terms | {"loss_region": rebuilt}
        )

    def predict(self, features: FrozenFeatures) -> tuple[Memory, Decoded]:
        """Decode the patches on the image they were taken from."""
        patches = features.crops()
        region = region_of_query(self.detector.num_queries, patches.shape[2], patches.device)
        memory = self.detector.encode(features.maps, features.pixel_mask)
        return memory, self.detector.decode(memory, self.queries(patches, region).flatten(0, 1), patch_mask(region))

    def queries(self, patches: Tensor, region: Tensor) -> Tensor:
        """(V, B, Q, D): each query's embedded patch; in training some are dropped, so that the learned embeddings
        matter too.
        """
        queries = self.region_embedding(patches).index_select(2, region)
        if self.training and self.config.patch_dropout > 0:
            queries = queries * self.kept(queries).unsqueeze(-1)
        return queries

    def kept(self, queries: Tensor) -> Tensor:
        """Which queries (V, B, Q, D) of a training step keep their patch: bool (V, B, Q), drawn at random."""
        return torch.rand(queries.shape[:3], device=queries.device) >= self.config.patch_dropout


def patch_mask(region: Tensor) -> Tensor:
    """bool (Q, Q), True where two queries carry the same patch and so see each other; ``region`` (Q,) is each query's
    patch.
    """
    return region.unsqueeze(0) == region.unsqueeze(1)
