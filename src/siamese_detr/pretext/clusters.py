"""Pseudo-classes: the proposals' frozen features fall into k-means clusters, and the detector learns to detect these.

As AlignDet (Li et al., ICCV 2023) does in its first stage. Everything is trained as in fine-tuning, by the family's own
losses: unlike the other tasks also the class heads, by which two-stage families choose their queries, and denoising.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

from siamese_detr.detection import criterion
from siamese_detr.detectors.functional import full_precision
from siamese_detr.detectors.structures import Targets
from siamese_detr.errors import UserError
from siamese_detr.pretext import losses
from siamese_detr.pretext.base import Matched, Pretext, PretextOutput
from siamese_detr.pretext.config import ClustersConfig
from siamese_detr.pretext.features import FrozenFeatures

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, Memory

SAMPLE = 256
"""Regions for each cluster, about, from which k-means learns the clusters."""


class ClustersPretext(Pretext):
    """One view with its proposals; a proposal's class is the cluster nearest to its crop's feature.

    Args:
        detector: of as many classes as ``config`` wants clusters.
        config: the number of clusters.

    Raises:
        UserError: the detector has another number of classes.
    """

    config: ClustersConfig
    centres: Tensor  # (clusters, C); saved with the run

    def __init__(self, detector: DetectorAdapter, config: ClustersConfig | None = None) -> None:
        super().__init__(detector, config or ClustersConfig())
        if len(detector.class_names) != self.config.classes:
            raise UserError(
                f"the detector has {len(detector.class_names)} classes, and {self.config.classes} are to be"
            )
        self.class_head = nn.Identity()  # the detector's own class heads learn
        detector.set_trainable(backbone=False, class_head=True)
        self.criterion = criterion.SetCriterion(criterion.CriterionConfig.of(detector.class_loss))
        self.register_buffer("centres", torch.zeros(self.config.classes, detector.channels[-1]))

    def begin(self, samples: Iterator[FrozenFeatures]) -> None:
        """Learn the clusters from the first so many regions.

        Raises:
            UserError: fewer regions than clusters.
        """
        described: list[Tensor] = []
        while sum(map(len, described)) < SAMPLE * len(self.centres) and (features := next(samples, None)) is not None:
            described.append(self.describe(features)[features.valid].cpu())
        count = sum(map(len, described))
        if count < len(self.centres):
            raise UserError(
                f"{count} regions do not fall into {len(self.centres)} classes: give more images, or lower classes"
            )
        with warnings.catch_warnings(action="ignore"):  # an empty cluster is no harm
            centres, _ = kmeans2(torch.cat(described).double().numpy(), len(self.centres), minit="++", rng=0)
        self.centres.copy_(torch.from_numpy(centres))

    def describe(self, features: FrozenFeatures) -> Tensor:
        """(V, B, P, C) unit vectors in full precision: the coarsest level of the regions' crop features."""
        return F.normalize(full_precision(features.crops()[..., -self.centres.shape[1] :]), dim=-1)

    def targets(self, features: FrozenFeatures) -> Targets:
        """The regions as labels of their views, view-major."""
        described = self.describe(features)
        classes = torch.cdist(described, self.centres.to(described.dtype)).argmin(-1)
        return Targets(classes.where(features.valid, -1).flatten(0, 1), features.targets.flatten(0, 1))

    def forward(self, features: FrozenFeatures) -> PretextOutput:
        """The losses of a batch of images with their proposals.

        Raises:
            UserError: features without crops.
            NonFiniteError: the predictions are NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        targets = self.targets(features)
        output = self.criterion(self.detector.detect(features.maps, features.pixel_mask, targets), targets)
        return PretextOutput(output.loss, output.terms)

    def predict(self, features: FrozenFeatures) -> tuple[Memory, Decoded]:
        """Decode the family's own queries."""
        memory = self.detector.encode(features.maps, features.pixel_mask)
        return memory, self.detector.decode(memory, None)

    def match(self, decoded: Decoded, features: FrozenFeatures) -> Matched:
        """Which query is whose, for reports; :meth:`forward` matches in its criterion."""
        lead, valid = features.boxes.shape[:2], features.valid
        logits = self.detector.classify(decoded.states) if decoded.logits is None else decoded.logits
        matches = criterion.match(logits, decoded.boxes, self.targets(features), self.criterion.config)
        matches = matches.unflatten(1, lead)
        states = losses.at_matches(decoded.states.unflatten(1, lead), matches)
        return Matched(states, matches, valid, losses.count(valid, torch.float32), {})
