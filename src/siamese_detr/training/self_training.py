"""Self-training of a fine-tuned detector on unlabelled images: a mean teacher.

The teacher is the detector with its averaged weights. It sees a weak view of each unlabelled image (flip, crop and
size), and what it finds there with enough confidence becomes the label of a strong view, which shares that geometry and
differs in colours, sharpness and erased parts. The student learns from labelled and pseudo-labelled images alike, half
of each (Mean Teacher, Tarvainen & Valpola 2017; for detectors Unbiased Teacher, Liu et al. 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from siamese_detr.detection.boxes import box_corners, iou
from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.detectors.structures import Targets
from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.decode import read_size
from siamese_detr.images.labels import read_labels
from siamese_detr.images.listing import ImageList
from siamese_detr.images.problems import LabelledImage
from siamese_detr.messages import say
from siamese_detr.training.labelled_dataset import (
    EpochBatches,
    LabelledSample,
    TrainingImages,
    collate,
    prepare,
    unreadable,
)

GUARD = 0.9
"""Self-training ends when the teacher's AP falls below this share of its best since it began: a teacher that learns
from its own errors gets worse and worse."""

Key = tuple[bool, int, int]


class MixedImages(Dataset):
    """Labelled and unlabelled samples by ``(labelled, epoch, index)``.

    Args:
        labelled: augmented as in supervised training.
        unlabelled: of which only flip, crop and size are drawn, in the same way.
        known: labels of unlabelled images by absolute path, see :func:`known_labels`. Their samples have these boxes,
            for :func:`correct` alone.
    """

    def __init__(self, labelled: TrainingImages, unlabelled: ImageList, known: Mapping[str, LabelledImage]) -> None:
        self.labelled, self.unlabelled, self.known = labelled, unlabelled, known
        weak = replace(labelled.transform, strong=False, colour_jitter=0.0)
        self.weak = TrainingImages(labelled.dataset, weak, labelled.seed)

    def __getitem__(self, key: Key) -> tuple[bool, LabelledSample]:
        labelled, epoch, index = key
        if labelled:
            return True, self.labelled[(epoch, index)]
        path = self.unlabelled.absolute(index)
        if path in self.known:
            return False, self.weak.sample(self.known[path], epoch, index)
        try:
            width, height = read_size(path)
        except ImageError as error:
            return False, unreadable(error, index)
        item = LabelledImage(
            id=index,
            path=Path(path),
            width=width,
            height=height,
            boxes=np.zeros((0, 4), np.float32),
            classes=np.zeros(0, np.int64),
            crowd=np.zeros(0, bool),
            areas=np.zeros(0),
            scores=np.zeros(0),
        )
        return False, self.weak.sample(item, epoch, index)


class MixedBatches:
    """Batches of as many unlabelled as labelled keys.

    Args:
        labelled, unlabelled: of the same number of batches and the same size.
    """

    def __init__(self, labelled: EpochBatches, unlabelled: EpochBatches) -> None:
        self.labelled, self.unlabelled, self.start = labelled, unlabelled, 0

    def __iter__(self) -> Iterator[list[Key]]:
        for position in range(self.start, len(self.labelled)):
            keys = ((True, self.labelled[position]), (False, self.unlabelled[position]))
            yield [(labelled, *key) for labelled, batch in keys for key in batch]


def collate_mixed(samples: Sequence[tuple[bool, LabelledSample]]) -> dict[str, Any]:
    """As ``collate`` for the labelled samples, with the batch of the unlabelled ones as ``unlabelled``."""
    batch, unlabelled = (collate([s for labelled, s in samples if labelled == wanted]) for wanted in (True, False))
    batch["skipped"] += unlabelled.pop("skipped")
    return batch | {"unlabelled": unlabelled}


def known_labels(source: str, class_names: Sequence[str]) -> dict[str, LabelledImage]:
    """Labels of "unlabelled" images, where their source has some: absolute path -> image. The run learns nothing from
    them; they tell how many of the teacher's boxes are right.

    Args:
        source: of the unlabelled images, such as a COCO JSON.
        class_names: of the detector; boxes of other classes are left out.
    """
    try:
        dataset = read_labels(source, class_names=class_names)
    except UserError:  # the usual case: a folder of photos
        return {}
    return {str(image.path): image for image in dataset.images}


def correct(found: Targets, true: Targets, overlap: float = 0.5) -> Tensor:
    """int64 (B,): how many of an image's found boxes are right. A true box makes one found box of its class right that
    overlaps it by this IoU.

    Args:
        found, true: labels of the same images.
        overlap: least IoU.
    """
    match = iou(box_corners(found.boxes).unsqueeze(2), box_corners(true.boxes).unsqueeze(1)) >= overlap
    match &= (found.classes.unsqueeze(2) == true.classes.unsqueeze(1)) & (found.classes >= 0).unsqueeze(2)
    # Of several boxes on one object one is right; boxes on different objects hardly ever compete for one.
    return match.any(1).sum(1).minimum(match.any(2).sum(1))


def strong_view() -> v2.Compose:
    """Of one uint8 image (3, H, W), in place: only the colours change, so that boxes stay where they are."""
    return v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(9, sigma=(0.1, 2.0))], p=0.5),
            v2.RandomErasing(p=0.5, scale=(0.02, 0.15)),
        ]
    )


@torch.no_grad()
def pseudo_labels(detector: DetectorAdapter, images: Tensor, mask: Tensor, thresholds: Tensor) -> Targets:
    """What the detector finds, as labels.

    Args:
        detector: with the teacher's weights.
        images: (B, 3, H, W), normalised.
        mask: (B, H, W) bool, True inside an image.
        thresholds: (classes,) least scores in [0, 1].
    """
    training = detector.training
    detector.eval()
    predictions = detector(images, mask)
    detector.train(training)
    logits = predictions.logits[-1].float()
    scores = logits.softmax(-1)[..., :-1] if detector.class_loss == "softmax" else logits.sigmoid()
    score, classes = scores.max(-1)  # (B, Q): a query is one object
    classes = classes.where(score >= thresholds[classes], -1)
    # The labels first, as many columns as the image with most of them has.
    order = (classes < 0).long().argsort(dim=1, stable=True)[:, : int((classes >= 0).sum(1).max())]
    boxes = predictions.boxes[-1].float().gather(1, order.unsqueeze(-1).expand(-1, -1, 4))
    return Targets(classes.gather(1, order), boxes)


class Teacher:
    """Labels the unlabelled part of a batch, and joins it to the labelled part.

    Args:
        detector: the student, whose averaged weights are the teacher's.
        steps: updates of the run.
        burn_in: share of them that are supervised alone.
        threshold: of all classes; None: those of the newest evaluation.
        stored: thresholds that the starting detector brings along; None if it has none.
    """

    def __init__(
        self,
        detector: DetectorAdapter,
        steps: int,
        burn_in: float,
        threshold: float | None,
        stored: Sequence[float] | None,
    ) -> None:
        self.detector, self.first, self.threshold, self.stored = detector, burn_in * steps, threshold, stored
        self.strong = strong_view()

    def thresholds(self, records: Sequence[Mapping[str, Any]]) -> Sequence[float] | None:
        """What the teacher's boxes must score after these evaluations; None: it does not teach, not yet or no more."""
        begun = [record for record in records if record["step"] >= self.first]
        if not begun and self.first > 0:
            return None
        if fallen(begun):
            return None
        found = begun[-1]["thresholds"] if begun else self.stored
        if self.threshold is not None:
            return [self.threshold] * len(self.detector.class_names)
        return found

    def report(self, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
        """Say whether the newest evaluation begins or ends self-training."""
        old, new = self.thresholds(before), self.thresholds(after)
        if old is None and new is not None:
            names = zip(self.detector.class_names, new, strict=True)
            shown = ", ".join(f"{name} {100 * score:.0f} %" for name, score in list(names)[:5])
            say(
                f"self-training begins, with the averaged detector's boxes from these scores on: {shown}",
            )
        elif old is not None and new is None:
            say(
                f"the averaged detector's AP fell below {100 * GUARD:.0f} % of its best: self-training ends, and "
                "training goes on with the labelled images alone",
            )

    def join(
        self, images: Tensor, mask: Tensor, targets: Targets, unlabelled: dict[str, Any], thresholds: Sequence[float]
    ) -> tuple[Tensor, Tensor, Targets]:
        """The labelled batch with the unlabelled one behind it, in its strong view and with the teacher's labels.

        The detector must have the teacher's weights.
        """
        mean, std = self.detector.image_mean, self.detector.image_std
        weak, weak_mask = prepare(unlabelled, mean, std)
        found = pseudo_labels(self.detector, weak, weak_mask, torch.tensor(thresholds, device=weak.device))
        strong, _ = prepare({**unlabelled, "images": torch.stack([*map(self.strong, unlabelled["images"])])}, mean, std)
        height, width = (max(images.shape[d], strong.shape[d]) for d in (-2, -1))
        most = max(targets.classes.shape[1], found.classes.shape[1])

        def padded(x: Tensor) -> Tensor:
            return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

        def filled(t: Targets) -> Targets:
            more = most - t.classes.shape[1]
            return Targets(F.pad(t.classes, (0, more), value=-1), F.pad(t.boxes, (0, 0, 0, more)))

        parts = [filled(targets), filled(found)]
        return (
            torch.cat([padded(images), padded(strong)]),
            torch.cat([padded(mask), padded(weak_mask)]),
            Targets(torch.cat([p.classes for p in parts]), torch.cat([p.boxes for p in parts])),
        )


def fallen(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether AP has ever fallen below GUARD of the best before it."""
    best = 0.0
    for record in records:
        best = max(best, record["AP"] or 0.0)
        if (record["AP"] or 0.0) < GUARD * best:
            return True
    return False
