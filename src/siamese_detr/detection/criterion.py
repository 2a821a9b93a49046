"""The set criterion of supervised fine-tuning, for all decoder layers and images of a batch at once.

Predictions are matched one-to-one to the labelled boxes, layer by layer (Hungarian matching, DETR §3.1). Matched
queries learn class and box, the others learn "no object". DETR uses a softmax with a no-object class, its successors
focal sigmoids. The values equal those of Transformers' own losses with two exceptions: the class weight of focal
detectors is the papers' 2, and box counts are averaged over processes correctly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from siamese_detr.detection.boxes import box_corners, full_precision, generalized_iou
from siamese_detr.detection.matching import assign, box_distance

Kind = Literal["softmax", "focal"]


@dataclass(frozen=True)
class CriterionConfig:
    """Weights of losses and matching costs (DETR; Deformable DETR for focal).

    Args:
        kind: "softmax" (K classes and a last, no-object one) or "focal" (K independent sigmoids).
        class_weight, box_weight, giou_weight: of the losses.
        class_cost, box_cost, giou_cost: of the matching.
        no_object_weight: weight of the no-object class in the softmax cross-entropy.
        alpha, gamma: of the focal loss.
    """

    kind: Kind
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 1.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0

    @classmethod
    def of(cls, kind: Kind) -> CriterionConfig:
        """The papers' weights: DETR 1/5/2, the focal detectors 2/5/2, for losses and costs alike."""
        return cls(kind) if kind == "softmax" else cls(kind, class_weight=2.0, class_cost=2.0)


@dataclass(frozen=True)
class Targets:
    """Labels of a batch, padded to the largest number T of boxes.

    Args:
        classes: (B, T) int64, −1 where padded.
        boxes: (B, T, 4), cxcywh in [0, 1] of the valid image; finite where padded.
    """

    classes: Tensor
    boxes: Tensor

    @property
    def valid(self) -> Tensor:
        """(B, T) bool."""
        return self.classes >= 0


@dataclass(frozen=True)
class CriterionOutput:
    """The weighted sum over all layers, and for the log the unweighted terms of the last layer (loss_class, loss_box,
    loss_giou) and the weighted sum of all other layers (loss_auxiliary)."""

    loss: Tensor
    terms: dict[str, Tensor]


class SetCriterion(nn.Module):
    """Matching and losses over the outputs of every decoder layer."""

    def __init__(self, config: CriterionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, logits: Tensor, boxes: Tensor, targets: Targets) -> CriterionOutput:
        """Score predictions.

        Args:
            logits: (layers, B, Q, K), with the no-object class last for softmax.
            boxes: (layers, B, Q, 4), cxcywh in [0, 1].
            targets: with class indices below K (softmax: K − 1).

        Raises:
            NonFiniteError: a prediction is NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        c = self.config
        logits, boxes = full_precision(logits), full_precision(boxes)
        layers, _, queries, channels = logits.shape

        # 1. Match: which query is nearest to which labelled box, one-to-one, in every layer and image.
        matches = match(logits, boxes, targets, c)  # (layers, B, T)
        matched = (matches >= 0) & targets.valid
        norm = normalisers(targets.valid, queries, c.no_object_weight)

        # 2. The class each query should predict: its target's, or "no object". Padding and targets without a query are
        # written to an extra query, which is cut off.
        no_object = channels - 1 if c.kind == "softmax" else channels
        labels = torch.full((*logits.shape[:2], queries + 1), no_object, dtype=torch.int64, device=logits.device)
        labels.scatter_(2, matches.where(matched, queries), targets.classes.clamp(min=0).expand_as(matches))
        labels = labels[..., :queries]

        # 3. Class loss over all queries. Most are no object, so softmax weighs these less, and focal the easy ones.
        if c.kind == "softmax":
            weights = logits.new_ones(channels)
            weights[-1] = c.no_object_weight
            losses = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), weights, reduction="none")
            class_loss = losses.view(layers, -1).sum(1) / norm.class_weight
        else:
            one_hot = F.one_hot(labels, channels + 1)[..., :-1].to(logits.dtype)  # all zero for no object
            class_loss = focal_loss(logits, one_hot, c.alpha, c.gamma).flatten(1).sum(1) / norm.boxes

        # 4. Box losses, L1 and 1 - GIoU, over the matched queries alone.
        outputs = boxes.gather(2, matches.clamp(min=0).unsqueeze(-1).expand(*matches.shape, 4))
        wanted = full_precision(targets.boxes).expand_as(outputs)
        distance = (outputs - wanted).abs().sum(-1)
        apart = 1 - generalized_iou(box_corners(outputs), box_corners(wanted))
        box_loss = distance.where(matched, 0).sum((1, 2)) / norm.boxes
        giou_loss = apart.where(matched, 0).sum((1, 2)) / norm.boxes

        # 5. Every decoder layer is trained like the last (auxiliary losses).
        per_layer = c.class_weight * class_loss + c.box_weight * box_loss + c.giou_weight * giou_loss
        terms = {
            "loss_class": class_loss[-1],
            "loss_box": box_loss[-1],
            "loss_giou": giou_loss[-1],
            "loss_auxiliary": per_layer[:-1].sum(),
        }
        return CriterionOutput(per_layer.sum(), {name: term.detach() for name, term in terms.items()})


@dataclass(frozen=True)
class Normalisers:
    """What the sums are divided by. They are means over processes: gradients averaged over processes then equal those
    of one process with the whole batch.

    Args:
        boxes: scalar, mean number of boxes per process, at least 1.
        class_weight: scalar, mean per process of the summed class weights of all queries of a layer (softmax).
    """

    boxes: Tensor
    class_weight: Tensor


def normalisers(valid: Tensor, queries: int, no_object_weight: float) -> Normalisers:
    """From the (B, T) mask of real targets; one collective, no host synchronisation."""
    boxes = valid.sum(1)
    matched = boxes.clamp(max=queries).sum()
    weight = matched + no_object_weight * (valid.shape[0] * queries - matched)
    means = torch.stack([boxes.sum().float(), weight.float()])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(means)
        means = means / dist.get_world_size()
    return Normalisers(means[0].clamp(min=1), means[1].clamp(min=torch.finfo(means.dtype).tiny))


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Targets, config: CriterionConfig) -> Tensor:
    """The query of each target in the cheapest one-to-one assignment, of every layer and image, with a single copy to
    the host, or none on a CUDA device.

    Arguments as :class:`SetCriterion`. With more targets than queries, those that cost most get none.

    Returns:
        (layers, B, T) int64; −1 for a target without a query; anything where targets are padding.
    """
    cost = matching_cost(logits, boxes, targets, config).transpose(2, 3)
    missing = max(cost.shape[2] - cost.shape[3], 0)
    # Dummy queries cost more than any real one: they take the targets that real queries leave.
    matches = assign(F.pad(cost, (0, missing), value=1e6) if missing else cost, targets.valid)
    return matches.masked_fill(matches >= logits.shape[2], -1) if missing else matches


def matching_cost(logits: Tensor, boxes: Tensor, targets: Targets, config: CriterionConfig) -> Tensor:
    """(layers, B, Q, T) cost of giving query q target t; meaningless where targets are padding."""
    if config.kind == "softmax":
        class_cost = -logits.softmax(-1)
    else:
        # How much the focal loss of this class would fall if the query were given the class (Deformable DETR).
        p = logits.sigmoid()
        with_class = config.alpha * (1 - p) ** config.gamma * -(p + 1e-8).log()
        without = (1 - config.alpha) * p**config.gamma * -(1 - p + 1e-8).log()
        class_cost = with_class - without
    labels = targets.classes.clamp(min=0)[None, :, None, :].expand(*logits.shape[:3], -1)
    wanted = full_precision(targets.boxes).to(boxes.dtype)
    distance = box_distance(boxes, wanted)
    overlap = generalized_iou(box_corners(boxes).unsqueeze(3), box_corners(wanted).unsqueeze(1))
    return config.class_cost * class_cost.gather(-1, labels) + config.box_cost * distance - config.giou_cost * overlap


def focal_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss of each logit (Lin et al., 2017), targets 0 or 1; same shape as ``logits``."""
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    wrong = p + targets - 2 * p * targets  # 1 − the probability of the true answer: p where 0, 1 − p where 1
    return (alpha * targets + (1 - alpha) * (1 - targets)) * entropy * wrong**gamma
