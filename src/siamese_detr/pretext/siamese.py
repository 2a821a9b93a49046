"""Siamese DETR: find in one view the regions given by the other, and agree with it about what they are (paper §3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from siamese_detr.errors import UserError
from siamese_detr.pretext import heads, losses
from siamese_detr.pretext.base import Matched, Pretext, PretextOutput
from siamese_detr.pretext.config import SiameseConfig
from siamese_detr.pretext.features import FrozenFeatures, pool_regions, region_of_query

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, Memory


class SiamesePretext(Pretext):
    """Both views and both directions pass as one batch: direction v decodes, on the memory of view v, the other view's
    regions.

    Args:
        detector: the detector to pre-train.
        config: weights and ablations.
    """

    config: SiameseConfig

    def __init__(self, detector: DetectorAdapter, config: SiameseConfig | None = None) -> None:
        config = config or SiameseConfig()
        super().__init__(detector, config)
        channels = sum(detector.channels)
        self.region_embedding = nn.Linear(channels, detector.hidden_size)
        self.region_head = heads.FeatureHead(detector.hidden_size, channels) if config.learns_regions else None
        self.global_head = None
        if config.learns_globally:
            self.global_head = heads.GlobalHead(
                detector.hidden_size * self._global_levels,
                config.global_hidden_size,
                config.global_size,
                config.global_predictor_size,
            )

    def forward(self, features: FrozenFeatures) -> PretextOutput:
        """The losses of a batch of view pairs.

        Raises:
            UserError: not two views, or fewer queries than regions.
            NonFiniteError: the predictions are NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        if features.views != 2:
            raise UserError(f"Siamese DETR compares two views of an image, not {features.views}")
        memory, decoded = self.predict(features)
        matched = self.match(decoded, features)
        terms = dict(matched.terms)
        if self.region_head is not None:
            terms["loss_region"] = self._region_loss(matched, features)
        if self.global_head is not None:
            predictions, projections = self.global_head(self._pooled(memory).unflatten(0, (2, -1)))
            terms["loss_global"] = losses.global_loss(predictions, projections, matched.counts)
        config = self.config
        return self.weighted({"loss_region": config.lambda_region, "loss_global": config.lambda_global}, terms)

    def predict(self, features: FrozenFeatures) -> tuple[Memory, Decoded]:
        """Decode on each view's memory the other view's regions."""
        memory = self.detector.encode(features.maps, features.pixel_mask)
        return memory, self.detector.decode(memory, self._other(self.queries(features)).flatten(0, 1))

    def queries(self, features: FrozenFeatures) -> Tensor:
        """q (V, B, Q, D): the region features of each view, embedded and repeated; the detector adds its own query
        embedding. Zero for the images of a training step that go without (``region_dropout``).
        """
        boxes = features.query_boxes if self.config.jitter_queries else features.boxes
        pooled = self._pool(features, boxes)
        region = region_of_query(self.detector.num_queries, boxes.shape[2], boxes.device)
        queries = self.region_embedding(pooled).index_select(2, region)
        if self.training and self.config.region_dropout > 0:
            kept = torch.rand(queries.shape[:2], device=queries.device) >= self.config.region_dropout
            queries = queries * kept[..., None, None]
        return queries

    def _pool(self, features: FrozenFeatures, boxes: Tensor) -> Tensor:
        sizes = None if self.config.pool_padding else features.sizes
        return pool_regions(features.maps, boxes, self.detector.strides, sizes)

    def _other(self, x: Tensor) -> Tensor:
        """From the view of a query to the view it is decoded on (and back)."""
        return x.flip(0) if self.config.cross_view else x

    def _region_loss(self, matched: Matched, features: FrozenFeatures) -> Tensor:
        assert self.region_head is not None
        if self.config.region_target == "roi":
            target = self._pool(features, features.boxes)
        else:
            target = features.crops()
        # Direction v's queries come from view _other(v); its own crops are that view's.
        own = self._other(target)
        target = own if self.config.target_view == "own" else own.flip(0)
        predicted = self.region_head(matched.states)
        with torch.autocast(predicted.device.type, enabled=False):
            return losses.region_loss(predicted, target, matched.valid, matched.counts)

    @property
    def _global_levels(self) -> int:
        levels = self.detector.num_levels
        return levels if self.config.global_levels == "all" else min(levels, len(self.detector.channels))

    def _pooled(self, memory: Memory) -> Tensor:
        if self.config.pool_padding:
            levels = memory.tokens.split([height * width for height, width in memory.shapes], dim=1)
            pooled = torch.cat([level.mean(1) for level in levels], dim=-1)
        else:
            pooled = memory.pooled()
        return pooled[:, : self.detector.hidden_size * self._global_levels]  # a level that was added comes last
