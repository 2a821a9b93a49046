"""The set criterion of supervised fine-tuning, for all decoder layers and images of a batch at once.

Predictions are matched one-to-one to the labelled boxes, layer by layer (Hungarian matching, DETR §3.1). Matched
queries learn class and box, the others learn "no object". How the class is learned is a fact of the detector's family
(docs/detectors.md has the table); the values equal those of Transformers' own losses, with the exceptions listed there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.loss.loss_d_fine import bbox2distance

from siamese_detr.detection.boxes import box_corners, generalized_iou, iou
from siamese_detr.detection.matching import assign, box_distance
from siamese_detr.detectors.functional import full_precision
from siamese_detr.detectors.structures import ClassLoss, Predictions, Targets


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
        local_weight, distillation_weight: of the losses of edge distributions (D-FINE).
    """

    kind: ClassLoss
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 2.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
    local_weight: float = 0.15
    distillation_weight: float = 1.5

    @classmethod
    def of(cls, kind: ClassLoss) -> CriterionConfig:
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
    loss_giou), the weighted sum of all other layers (loss_auxiliary), of the losses of edges (loss_local), and of all
    losses of the denoising queries (loss_denoising)."""

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
        c, groups, denoising = self.config, predictions.groups, predictions.denoising
        logits, boxes = prepared(predictions)  # (layers * groups, B, Q, ·)
        if targets.classes.shape[1] == 0:  # a padding target, so that indices have something to point to
            targets = Targets(F.pad(targets.classes, (0, 1), value=-1), F.pad(targets.boxes, (0, 0, 0, 1)))

        # Match: which query is nearest to which labelled box, one-to-one, in every layer and image.
        matches = match(logits, boxes, targets, c)
        assigned = box_assigned = queries_to_targets(matches, targets.valid, logits.shape[2])
        if predictions.edges is not None:
            box_assigned = union_of_layers(assigned, targets.classes.shape[1])
        norm = normalisers(predictions, targets, box_assigned, c)

        # Every decoder layer is trained like the last (auxiliary losses).
        sums = self.layer_sums(logits, boxes, assigned, box_assigned, targets).unflatten(1, (-1, groups)).mean(2)
        class_loss = sums[0] / (norm.class_weight if c.kind == "softmax" else norm.boxes)
        box_loss, giou_loss = sums[1:] / (norm.boxes if predictions.edges is None else norm.union)
        per_layer = c.class_weight * class_loss + c.box_weight * box_loss + c.giou_weight * giou_loss
        loss = per_layer.sum()
        terms = {
            "loss_class": class_loss[-1],
            "loss_box": box_loss[-1],
            "loss_giou": giou_loss[-1],
            "loss_auxiliary": per_layer[:-1].sum(),
        }
        if predictions.edges is not None:
            terms["loss_local"] = self.local_loss(predictions, boxes, box_assigned, targets, norm.union, norm.queries)
            loss = loss + terms["loss_local"]

        # Denoising queries need no matching: each was made from a target, or is to be told from one.
        if denoising is not None and denoising.assigned is not None:
            logits, boxes = prepared(denoising)
            assigned = denoising.assigned.expand(len(logits), -1, -1)
            sums = self.layer_sums(logits, boxes, assigned, assigned, targets).sum(1) / norm.denoising
            denoised = sums @ sums.new_tensor([c.class_weight, c.box_weight, c.giou_weight])
            if denoising.edges is not None:
                norms = norm.denoising, norm.denoising_queries
                denoised = denoised + self.local_loss(denoising, boxes, assigned[0], targets, *norms)
            terms["loss_denoising"] = denoised
            loss = loss + denoised
        return CriterionOutput(loss, {name: term.detach() for name, term in terms.items()})

    def layer_sums(
        self, logits: Tensor, boxes: Tensor, assigned: Tensor, box_assigned: Tensor, targets: Targets
    ) -> Tensor:
        """Class, L1 and GIoU loss of each layer, summed over images and queries.

        Args:
            logits, boxes: (layers, B, Q, K) and (layers, B, Q, 4).
            assigned: (layers, B, Q) int64, the target whose class each query is to predict, −1 for none.
            box_assigned: (layers, B, Q) or (B, Q), likewise for its box.
            targets: of at least one (padding) target an image.

        Returns:
            (3, layers).
        """
        # The class loss over all queries, the box losses, L1 and 1 - GIoU, over the matched ones alone.
        predicted = box_corners(boxes)
        overlap = iou(predicted.detach(), box_corners(boxes_of(targets, assigned)))
        classes = targets.classes.expand(len(boxes), -1, -1).gather(2, assigned.clamp(min=0)).where(assigned >= 0, -1)
        class_loss = class_losses(logits, classes, overlap, self.config).flatten(1).sum(1)
        wanted = boxes_of(targets, box_assigned)
        distance = (boxes - wanted).abs().sum(-1)
        apart = 1 - generalized_iou(predicted, box_corners(wanted))
        return torch.stack([class_loss, *(x.where(box_assigned >= 0, 0).sum((1, 2)) for x in (distance, apart))])

    def local_loss(
        self,
        predictions: Predictions,
        boxes: Tensor,
        assigned: Tensor,
        targets: Targets,
        positives: Tensor,
        queries: Tensor,
    ) -> Tensor:
        """D-FINE's losses of edge distributions, weighted and summed over layers (D-FINE §4.1 and §4.2).

        Args:
            predictions: with edges.
            boxes: (layers, B, Q, 4), those of the predictions.
            assigned: (B, Q) int64, the target of each query, −1 for none.
            targets: of at least one (padding) target an image.
            positives, queries: numbers of queries with a target, and of all.
        """
        edges = predictions.edges
        assert edges is not None
        logits, matched = full_precision(edges.logits), assigned >= 0
        wanted = box_corners(boxes_of(targets, assigned))
        overlap = iou(box_corners(boxes[-len(logits) :].detach()), wanted)  # (L, B, Q)

        # Fine-grained localisation: the two bins around the distance that is to be predicted, better boxes first.
        with torch.no_grad():
            distances, right, left = bbox2distance(
                edges.references[matched].float(), wanted[matched].float(), logits.shape[-1] - 1, edges.scale, edges.up
            )  # for each edge of each matched query: its bin, and shares of the next bin and of this one
        at, shares = (torch.stack(pair, -1).view(-1, 4, 2) for pair in ((distances, distances + 1), (left, right)))
        log_p = logits[:, matched].log_softmax(-1).gather(-1, at.long().expand(len(logits), -1, -1, -1))
        fine = -((log_p * shares).sum((-1, -2)) * overlap[:, matched]).sum() / positives

        # Self-distillation: earlier layers learn the last one's distributions, also those of unmatched queries as far
        # as these are confident. Both kinds count by the root of their number.
        temperature = 5
        teacher = (logits[-1:].detach() / temperature).softmax(-1).expand_as(logits[:-1])
        apart = F.kl_div((logits[:-1] / temperature).log_softmax(-1), teacher, reduction="none").sum(-1).mean(-1)
        confidence = full_precision(predictions.logits[-1]).detach().sigmoid().amax(-1)
        apart = apart * temperature**2 * overlap[:-1].where(matched, confidence)
        negatives = (queries - positives).clamp(min=1)
        matched_mean = apart.where(matched, 0).sum() / positives
        other_mean = apart.where(~matched, 0).sum() / negatives
        root, other_root = positives.sqrt(), negatives.sqrt()
        distilled = (matched_mean * root + other_mean * other_root) / (root + other_root)
        return self.config.local_weight * fine + self.config.distillation_weight * distilled


def prepared(predictions: Predictions) -> tuple[Tensor, Tensor]:
    """Logits and boxes in full precision, each group of queries as if it were a layer: (layers * groups, B, Q, ·)."""
    logits, boxes = full_precision(predictions.logits), full_precision(predictions.boxes)
    if predictions.edges is not None:
        boxes = boxes.clamp(0, 1)  # as Transformers' losses do
    if predictions.groups == 1:
        return logits, boxes
    logits, boxes = (x.unflatten(2, (predictions.groups, -1)).movedim(2, 1).flatten(0, 1) for x in (logits, boxes))
    return logits, boxes


def boxes_of(targets: Targets, assigned: Tensor) -> Tensor:
    """The boxes (..., B, Q, 4), cxcywh, of the targets assigned to queries (..., B, Q); anything where none is."""
    boxes = full_precision(targets.boxes).expand(*assigned.shape[:-2], -1, -1, -1)
    return boxes.gather(-2, assigned.clamp(min=0).unsqueeze(-1).expand(*assigned.shape, 4))


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
        boxes: mean number of boxes per process; as all others a scalar, and at least 1.
        class_weight: summed class weights of all queries of a layer (softmax); at least tiny.
        union: queries matched in any layer.
        queries: of a layer and group.
        denoising: denoising queries that are to predict a box.
        denoising_queries: all of them.
    """

    boxes: Tensor
    class_weight: Tensor
    union: Tensor
    queries: Tensor
    denoising: Tensor
    denoising_queries: Tensor


def normalisers(
    predictions: Predictions, targets: Targets, box_assigned: Tensor, config: CriterionConfig
) -> Normalisers:
    """One collective, no host synchronisation."""
    valid, denoising = targets.valid, predictions.denoising
    queries = predictions.logits.shape[2] // predictions.groups
    boxes = valid.sum().float()
    total = boxes.new_full((), len(valid) * queries)
    matched = valid.sum(1).clamp(max=queries).sum()
    weight = matched + config.no_object_weight * (total - matched)
    noisy = boxes.new_full((), 0 if denoising is None else len(valid) * denoising.logits.shape[2])
    recovered = boxes * (0 if denoising is None else denoising.repeats)
    values = [boxes, weight, (box_assigned >= 0).sum().float(), total, recovered, noisy]
    boxes, weight, *others = mean_over_processes(torch.stack(values)).unbind()
    tiny = torch.finfo(weight.dtype).tiny
    return Normalisers(boxes.clamp(min=1), weight.clamp(min=tiny), *(x.clamp(min=1) for x in others))


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


def union_of_layers(assigned: Tensor, count: int) -> Tensor:
    """One assignment for the boxes of all layers (D-FINE §4.2): each query matched in any layer, with the target it is
    matched to in most of them.

    Args:
        assigned: (layers, B, Q) int64, −1 for none.
        count: number T of targets.

    Returns:
        (B, Q) int64, −1 for none.
    """
    votes, target = F.one_hot(assigned + 1, count + 1)[..., 1:].sum(0).max(-1)
    return target.where(votes > 0, -1)


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
