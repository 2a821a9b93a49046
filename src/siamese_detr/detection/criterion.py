"""The set criterion of supervised fine-tuning, for all decoder layers and images of a batch at once.

Predictions are matched one-to-one to the labelled boxes, layer by layer (Hungarian matching, DETR §3.1). Matched
queries learn class and box, the others learn "no object". How the class is learned is a fact of the detector's family
(docs/detectors.md has the table); the values equal those of Transformers' own losses, with the exceptions listed there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from siamese_detr.detection.boxes import box_corners, full_precision, generalized_iou, iou
from siamese_detr.detection.matching import assign, box_distance
from siamese_detr.detectors.structures import Predictions, Targets

Kind = Literal["softmax", "focal", "varifocal", "iou-bce", "matching-aware"]


@dataclass(frozen=True)
class CriterionConfig:
    """Weights of losses and matching costs.

    Args:
        kind: the class loss. "softmax": K classes and a last, no-object one. The others are K independent sigmoids:
            "focal"; and three that learn the IoU of the predicted box as the score of its class, "varifocal",
            "iou-bce" and "matching-aware".
        class_weight, box_weight, giou_weight: of the losses.
        class_cost, box_cost, giou_cost: of the matching.
        no_object_weight: weight of the no-object class in the softmax cross-entropy.
        alpha, gamma: of the class loss.
    """

    kind: Kind
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0

    @classmethod
    def of(cls, kind: Kind) -> CriterionConfig:
        """The values of the papers that use this class loss."""
        return {
            "softmax": cls("softmax", class_cost=1.0),
            "focal": cls("focal", class_weight=2.0),
            "varifocal": cls("varifocal", alpha=0.75),
            "iou-bce": cls("iou-bce"),
            "matching-aware": cls("matching-aware", gamma=1.5),
        }[kind]


@dataclass(frozen=True)
class CriterionOutput:
    """The weighted sum over all layers, and for the log the unweighted terms of the last layer (loss_class, loss_box,
    loss_giou), the weighted sum of all other layers (loss_auxiliary), and that of the denoising queries
    (loss_denoising)."""

    loss: Tensor
    terms: dict[str, Tensor]


class SetCriterion(nn.Module):
    """Matching and losses over the outputs of every decoder layer."""

    def __init__(self, config: CriterionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, predictions: Predictions, targets: Targets) -> CriterionOutput:
        """Score predictions.

        Args:
            predictions: of every layer.
            targets: with class indices below K (softmax: K − 1).

        Raises:
            NonFiniteError: a prediction is NaN or infinite; not on a CUDA device, see ``matching.assign``.
        """
        c, denoising = self.config, predictions.denoising
        logits, boxes = full_precision(predictions.logits), full_precision(predictions.boxes)
        queries = logits.shape[2]
        norm = normalisers(targets.valid, queries, c.no_object_weight, denoising.repeats if denoising else 0)
        if targets.classes.shape[1] == 0:  # a padding target, so that indices have something to point to
            targets = Targets(F.pad(targets.classes, (0, 1), value=-1), F.pad(targets.boxes, (0, 0, 0, 1)))

        # Match: which query is nearest to which labelled box, one-to-one, in every layer and image.
        matches = match(logits, boxes, targets, c)  # (layers, B, T)
        assigned = queries_to_targets(matches, targets.valid, queries)

        # Every decoder layer is trained like the last (auxiliary losses).
        class_norm = norm.class_weight if c.kind == "softmax" else norm.boxes
        class_loss, box_loss, giou_loss = self.layer_losses(logits, boxes, assigned, targets, class_norm, norm.boxes)
        per_layer = c.class_weight * class_loss + c.box_weight * box_loss + c.giou_weight * giou_loss
        loss = per_layer.sum()
        terms = {
            "loss_class": class_loss[-1],
            "loss_box": box_loss[-1],
            "loss_giou": giou_loss[-1],
            "loss_auxiliary": per_layer[:-1].sum(),
        }

        # Denoising queries need no matching: each was made from a target, or is to be told from one.
        if denoising is not None:
            assert denoising.assigned is not None
            logits, boxes = full_precision(denoising.logits), full_precision(denoising.boxes)
            assigned = denoising.assigned.expand(len(logits), -1, -1)
            sums = self.layer_losses(logits, boxes, assigned, targets, norm.denoising, norm.denoising).sum(1)
            terms["loss_denoising"] = sums @ sums.new_tensor([c.class_weight, c.box_weight, c.giou_weight])
            loss = loss + terms["loss_denoising"]
        return CriterionOutput(loss, {name: term.detach() for name, term in terms.items()})

    def layer_losses(
        self, logits: Tensor, boxes: Tensor, assigned: Tensor, targets: Targets, class_norm: Tensor, box_norm: Tensor
    ) -> Tensor:
        """Class, L1 and GIoU loss of each layer, unweighted.

        Args:
            logits, boxes: (layers, B, Q, K) and (layers, B, Q, 4).
            assigned: (layers, B, Q) int64, the target of each query, −1 for none.
            targets: of at least one (padding) target an image.
            class_norm, box_norm: what the sums are divided by.

        Returns:
            (3, layers).
        """
        matched, index = assigned >= 0, assigned.clamp(min=0)
        wanted = full_precision(targets.boxes).to(boxes.dtype).expand(len(boxes), -1, -1, -1)
        wanted = wanted.gather(2, index.unsqueeze(-1).expand(*index.shape, 4))
        classes = targets.classes.expand(len(boxes), -1, -1).gather(2, index).where(matched, -1)
        predicted, wanted_corners = box_corners(boxes), box_corners(wanted)

        # The class loss over all queries, the box losses, L1 and 1 - GIoU, over the matched ones alone.
        overlap = iou(predicted.detach(), wanted_corners)
        class_loss = class_losses(logits, classes, overlap, self.config).flatten(1).sum(1) / class_norm
        distance = (boxes - wanted).abs().sum(-1)
        apart = 1 - generalized_iou(predicted, wanted_corners)
        box_loss, giou_loss = (x.where(matched, 0).sum((1, 2)) / box_norm for x in (distance, apart))
        return torch.stack([class_loss, box_loss, giou_loss])


def class_losses(logits: Tensor, classes: Tensor, overlap: Tensor, config: CriterionConfig) -> Tensor:
    """The class loss of each query (softmax) or of each of its logits (all others).

    Args:
        logits: (..., Q, K).
        classes: (..., Q) int64, −1 for no object.
        overlap: (..., Q), IoU of the predicted box with its target's; anything where there is no object.
    """
    alpha, gamma = config.alpha, config.gamma
    if config.kind == "softmax":  # most queries are no object, so these weigh less
        weights = logits.new_ones(logits.shape[-1])
        weights[-1] = config.no_object_weight
        labels = classes.where(classes >= 0, logits.shape[-1] - 1)
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), weights, reduction="none").view(classes.shape)
    one_hot = F.one_hot(classes + 1, logits.shape[-1] + 1)[..., 1:].to(logits.dtype)  # all zero for no object
    p = logits.sigmoid()
    score = overlap.unsqueeze(-1) * one_hot
    if config.kind == "focal":  # Lin et al., 2017: what is easily told weighs less
        entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
        wrong = p + one_hot - 2 * p * one_hot  # 1 − the probability of the right value: p where 0, 1 − p where 1
        return (alpha * one_hot + (1 - alpha) * (1 - one_hot)) * entropy * wrong**gamma
    if config.kind == "iou-bce":  # LW-DETR §3.3: the better the box and the score, the more a positive counts
        quality = (p**alpha * score ** (1 - alpha)).clamp(min=0.01).detach() * one_hot
        negative = p**gamma * (1 - one_hot) + one_hot - quality
        return -quality * F.logsigmoid(logits) - negative * F.logsigmoid(-logits)
    if config.kind == "varifocal":  # Zhang et al., 2021
        weight = alpha * p**gamma * (1 - one_hot) + score
    else:  # DEIM §3.3: unlike above, a match of low IoU still counts fully
        weight = p**gamma * (1 - one_hot) + one_hot
        score = score**gamma
    return F.binary_cross_entropy_with_logits(logits, score, weight.detach(), reduction="none")


@dataclass(frozen=True)
class Normalisers:
    """What the sums are divided by. They are means over processes: gradients averaged over processes then equal those
    of one process with the whole batch.

    Args:
        boxes: scalar, mean number of boxes per process, at least 1.
        class_weight: scalar, mean per process of the summed class weights of all queries of a layer (softmax).
        denoising: scalar, mean number per process of denoising queries that are to predict a box, at least 1.
    """

    boxes: Tensor
    class_weight: Tensor
    denoising: Tensor


def normalisers(valid: Tensor, queries: int, no_object_weight: float, repeats: int) -> Normalisers:
    """From the (B, T) mask of real targets; one collective, no host synchronisation."""
    boxes = valid.sum(1)
    matched = boxes.clamp(max=queries).sum()
    weight = matched + no_object_weight * (valid.shape[0] * queries - matched)
    means = mean_over_processes(torch.stack([boxes.sum().float(), weight.float(), repeats * boxes.sum().float()]))
    boxes, weight, denoising = means.unbind()
    return Normalisers(boxes.clamp(min=1), weight.clamp(min=torch.finfo(means.dtype).tiny), denoising.clamp(min=1))


def mean_over_processes(values: Tensor) -> Tensor:
    """A collective where there are several processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
        return values / dist.get_world_size()
    return values


def queries_to_targets(matches: Tensor, valid: Tensor, queries: int) -> Tensor:
    """The query of each target (layers, B, T), as :func:`match` gives it, to the target of each query (layers, B, Q),
    −1 for none."""
    matched = (matches >= 0) & valid
    index = torch.arange(matches.shape[2], device=matches.device).expand_as(matches)
    # Padding and targets without a query are written to an extra query, which is cut off.
    assigned = torch.full((*matches.shape[:2], queries + 1), -1, dtype=torch.int64, device=matches.device)
    return assigned.scatter_(2, matches.where(matched, queries), index)[..., :queries]


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
        with_class = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        without = 0.75 * p**2 * -(1 - p + 1e-8).log()
        class_cost = with_class - without
    labels = targets.classes.clamp(min=0)[None, :, None, :].expand(*logits.shape[:3], -1)
    wanted = full_precision(targets.boxes).to(boxes.dtype)
    distance = box_distance(boxes, wanted)
    overlap = generalized_iou(box_corners(boxes).unsqueeze(3), box_corners(wanted).unsqueeze(1))
    return config.class_cost * class_cost.gather(-1, labels) + config.box_cost * distance - config.giou_cost * overlap
