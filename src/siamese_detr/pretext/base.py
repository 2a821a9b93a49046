"""What the pretext tasks share: the detection losses after matching, and the sum of all terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from siamese_detr.detection import matching
from siamese_detr.detection.matching import MatchCosts
from siamese_detr.pretext import heads, losses
from siamese_detr.pretext.features import FrozenFeatures, check_queries, freeze

if TYPE_CHECKING:
    from siamese_detr.detectors.adapter import Decoded, DetectorAdapter, Memory
    from siamese_detr.pretext.config import PretextConfig
    from siamese_detr.views.batch import ViewInputs


@dataclass
class PretextOutput:
    """A step's result.

    Args:
        loss: scalar with gradient: the weighted sum over terms and layers.
        terms: the un-weighted terms, detached scalars still on the device (reading one waits for it). ``loss_box`` is
            the last decoder layer's, ``loss_box_0`` the first's; per-direction losses are averaged over directions.
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Matched:
    """Matched predictions of all layers and directions.

    Args:
        states: (layers, V, B, P, D) decoder states of the matched queries.
        matches: int64 (layers, V, B, P).
        valid: bool (V, B, P).
        counts: what the losses are divided by.
        terms: loss_class, loss_box and loss_giou, each (layers, V).
    """

    states: Tensor
    matches: Tensor
    valid: Tensor
    counts: losses.Counts
    terms: dict[str, Tensor]


class Pretext(nn.Module):
    """A detector and the heads of a pretext task.

    Args:
        detector: the detector whose Transformer learns; its backbone stays frozen.
        config: the task's configuration.
    """

    def __init__(self, detector: DetectorAdapter, config: PretextConfig) -> None:
        super().__init__()
        self.detector = detector
        self.config = config
        self.class_head: nn.Module = heads.class_head(detector.hidden_size)

    @property
    def needs_crops(self) -> bool:
        """Whether batches must hold the regions' crops."""
        return self.config.needs_crops

    def frozen_features(self, inputs: ViewInputs) -> FrozenFeatures:
        """Everything :meth:`forward` needs, computed without gradient by the frozen backbone."""
        return freeze(self.detector, inputs, crops=self.needs_crops)

    def begin(self, samples: Iterator[FrozenFeatures]) -> None:
        """Called once, before the first step, with features of the run's images, computed as they are asked for."""

    def predict(self, features: FrozenFeatures) -> tuple[Memory, Decoded]:
        """Encode a batch and decode this task's queries; the decoder's batch is view-major."""
        raise NotImplementedError

    def forward(self, features: FrozenFeatures) -> PretextOutput:
        """The losses of a batch."""
        raise NotImplementedError

    def match(self, decoded: Decoded, features: FrozenFeatures) -> Matched:
        """Match predictions to the boxes of the view whose memory was decoded, and compute the detection losses."""
        lead = features.boxes.shape[:2]
        states = decoded.states.unflatten(1, lead)
        boxes = decoded.boxes.unflatten(1, lead)
        logits = self.class_head(states)
        targets, valid = features.targets, features.valid
        config = self.config
        costs = MatchCosts(config.class_cost, config.box_cost, config.giou_cost)
        check_queries(boxes.shape[3], targets.shape[2])
        with torch.autocast(states.device.type, enabled=False):
            matches = matching.match(logits, boxes, targets, valid, costs)
            counts = losses.count(valid, torch.promote_types(boxes.dtype, torch.float32))
            box, giou = losses.box_losses(losses.at_matches(boxes, matches), targets, valid, counts)
            objectness = losses.class_loss(logits, matches, valid, counts, config.no_object_weight)
        return Matched(
            states=losses.at_matches(states, matches),
            matches=matches,
            valid=valid,
            counts=counts,
            terms={"loss_class": objectness, "loss_box": box, "loss_giou": giou},
        )

    def weighted(self, weights: dict[str, float], terms: dict[str, Tensor]) -> PretextOutput:
        """Sum ``terms`` (scalars, or (layers, V): mean over directions, sum over layers) with ``weights`` and the box
        weights.
        """
        config = self.config
        weights = {
            "loss_class": config.class_weight,
            "loss_box": config.box_weight,
            "loss_giou": config.giou_weight,
        } | weights
        weighted = [weights[name] * (term.mean(-1).sum() if term.ndim else term) for name, term in terms.items()]
        scalars: dict[str, Tensor] = {}
        for name, term in terms.items():
            if term.ndim == 0:
                scalars[name] = term.detach()
                continue
            *auxiliary, last = term.detach().mean(-1).unbind()
            scalars[name] = last
            scalars |= {f"{name}_{layer}": value for layer, value in enumerate(auxiliary)}
        return PretextOutput(loss=torch.stack(weighted).sum(), terms=scalars)
