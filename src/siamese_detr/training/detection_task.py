"""Fine-tuning on labels: the training loop with the set criterion, COCO metrics after every so many steps, best and
last detector."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import box_convert

from siamese_detr.detection.criterion import CriterionConfig, SetCriterion
from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.detectors.structures import Targets
from siamese_detr.evaluation.coco import CocoMetrics, percent
from siamese_detr.evaluation.draw import draw_detections
from siamese_detr.evaluation.evaluate import evaluate_detector
from siamese_detr.evaluation.inference import DEFAULT_THRESHOLD, Detector
from siamese_detr.files import write_json, write_text
from siamese_detr.images.labels import DetectionDataset, LabelledImage
from siamese_detr.images.listing import ImageList
from siamese_detr.images.names import class_map
from siamese_detr.interchange.model_card import write_card
from siamese_detr.messages import say
from siamese_detr.randomness import rng
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.labelled_dataset import (
    EpochBatches,
    InputSize,
    LabelledSample,
    TrainingImages,
    collate,
    draw_cut,
    jitter_colours,
    prepare,
)
from siamese_detr.training.loop import Loop
from siamese_detr.training.self_training import MixedBatches, MixedImages, Teacher, collate_mixed, correct, known_labels
from siamese_detr.training.task import Task

TRIED = 300
"""Batches of which the largest says how much memory a run needs."""
SHOWN, COLUMNS, SIDE = 12, 4, 400
"""Of the page of augmented photos: how many, how many in a row, and the side of each in pixels."""


class DetectionTask(Task):
    """Trains a detector on labelled images.

    Writes ``history.jsonl`` (one line of COCO metrics per evaluation), ``metrics.json`` (the best and the last of
    them), ``detections-best.npz`` and ``detections-last.npz`` (what was found in the validation images), and the
    Hugging Face directories ``best`` and ``last`` into the run directory.

    Args:
        detector: with the class head that fits ``images``.
        config: of the run.
        steps: updates in all.
        images: augmented training images.
        validation: labelled images to evaluate on; None: there is no evaluation, and only ``last`` is written.
        input_size: of evaluation, stored with the detector.
        unlabelled: further images, from which the detector learns by self-training.
        repeats: how often an epoch has each training image, see :func:`repeat_factors`; None: once.
    """

    verb = "finetune"

    def __init__(
        self,
        detector: DetectorAdapter,
        config: FinetuneConfig,
        steps: int,
        images: TrainingImages,
        validation: DetectionDataset | None,
        input_size: InputSize,
        unlabelled: ImageList | None = None,
        repeats: np.ndarray | None = None,
    ) -> None:
        micro, count = config.batch_size // config.accumulate, steps * config.accumulate
        batches = EpochBatches(len(images), micro, count, config.seed, repeats)
        self.teacher: Teacher | None = None
        self.known: dict[str, LabelledImage] = {}
        if unlabelled is None:
            super().__init__(detector, images, batches, collate, epoch_size=batches.epoch_size)
        else:
            stored = getattr(detector.config, "score_thresholds", None)
            self.teacher = Teacher(detector, steps, config.burn_in, config.pseudo_threshold, stored)
            mixed = MixedBatches(batches, EpochBatches(len(unlabelled), micro, count, config.seed))
            self.known = known_labels(str(config.unlabelled), detector.class_names)
            samples = MixedImages(images, unlabelled, self.known)
            super().__init__(detector, samples, mixed, collate_mixed, epoch_size=batches.epoch_size)
        self.detector, self.config, self.steps, self.images = detector, config, steps, images
        self.validation, self.input_size = validation, input_size
        self.evaluations = config.evaluations(batches.epoch_size) if validation is not None else 0
        self.evaluated = self.evaluations * len(validation or ())
        self.criterion = SetCriterion(CriterionConfig.of(detector.class_loss))
        self.square_sides = config.square_sides(input_size, detector.square_side or 32)
        self.processor = detector.image_processor(**dataclasses.asdict(input_size))
        self.out = Path(config.out)
        self.history = JsonLines(self.out / "history.jsonl")
        self._records: list[dict[str, Any]] | None = None

    def step(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pixel_values, pixel_mask = prepare(batch, self.detector.image_mean, self.detector.image_std)
        targets, terms = Targets(batch["classes"], batch["boxes"]), {}
        unlabelled = batch.get("unlabelled")
        if self.teacher is not None and unlabelled is not None and len(unlabelled["images"]):
            thresholds = self.teacher.thresholds(self.records)
            if thresholds is not None:
                with self.averaged():
                    parts = self.teacher.join(pixel_values, pixel_mask, targets, unlabelled, thresholds)
                pixel_values, pixel_mask, targets = parts
                found = Targets(*(part[len(batch["images"]) :] for part in (targets.classes, targets.boxes)))
                terms["pseudo_boxes"] = (found.classes >= 0).sum(1).float().mean()
                if self.known:
                    true = Targets(unlabelled["classes"], unlabelled["boxes"])
                    terms["pseudo_correct"] = correct(found, true).float().mean()
        if len(self.square_sides) > 1:  # a batch is of one size, so that nothing is padded
            side = batch.get("side") or self.square_sides[int(torch.randint(len(self.square_sides), ()))]
            pixel_values = F.interpolate(pixel_values, (side, side), mode="bilinear", antialias=True)
            pixel_mask = pixel_mask.new_ones(len(pixel_mask), side, side)
        output = self.criterion(model(pixel_values, pixel_mask, targets), targets)
        return output.loss, {**output.terms, **terms}

    def largest(self, images: int) -> dict[str, Any]:
        """Noise, with as many boxes as the image with most of them; a pair of images where some are unlabelled."""
        random, items = np.random.default_rng(0), self.images.dataset.images
        most = max(len(item.boxes) for item in items)
        height, width = self._largest_size(random)
        count = images * (1 if self.teacher is None else 2)
        samples = [
            LabelledSample(
                pixels=random.integers(0, 256, (height, width, 3), np.uint8),
                boxes=random.uniform(0.3, 0.6, (most, 4)).astype(np.float32),
                classes=random.integers(0, len(self.detector.class_names), most),
                jitter=np.ones(3, np.float32),
                index=0,
            )
            for _ in range(count)
        ]
        return {**collate(samples), "side": self.square_sides[-1] if self.square_sides else None}

    def _largest_size(self, random: np.random.Generator) -> tuple[int, int]:
        """(height, width) of the largest batch, padding included, of some hundred."""
        transform, items = self.images.transform, self.images.dataset.images
        if transform.square:
            return transform.image_size, transform.image_size
        if transform.strong:  # its crops may have any shape
            return transform.max_size, transform.max_size
        batches = random.integers(0, len(items), (TRIED, self.config.batch_size // self.config.accumulate)).tolist()
        cuts = ([draw_cut(items[n].width, items[n].height, transform, random).size for n in batch] for batch in batches)
        padded = [(max(height for height, _ in sizes), max(width for _, width in sizes)) for sizes in cuts]
        return max(padded, key=math.prod)

    def pictures(self) -> Mapping[str, Image.Image]:
        return {"augmented": augmented_page(self.images)} if self.config.pages else {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """The evaluations so far, in every process (a resumed run reads them where the main process wrote them)."""
        if self._records is None:
            self._records = self.history.read()
        return self._records

    def stopped_early(self, step: int) -> bool:
        patience, records = self.config.patience, self.records
        if not patience or not records:
            return False
        since = len(records) - 1 - records.index(dict(best_of(records)))
        if since >= patience:
            say(
                f"AP has not risen for {since} evaluations: stopped after {step} of {self.steps} steps",
            )
        return since >= patience

    def still_unreadable(self, path: str) -> bool:
        index = self.images.index.get(path)
        return index is not None and self.images[(0, index)].pixels is None

    def evaluates_at(self, step: int) -> bool:
        return is_due(step, self.steps, self.evaluations)

    def lacks_evaluation(self, step: int) -> bool:
        """The run evaluates again what lies behind its checkpoint, and first what a stop cut short at it."""
        records = self.history.rewind(step)
        return step > 0 and self.evaluates_at(step) and step not in {record["step"] for record in records}

    def evaluate(self, loop: Loop) -> None:
        """COCO metrics on the validation images, on all processes; the best detector so far is kept.

        Raises:
            Preempted: asked to stop; the run is saved, and evaluates again when it is continued.
        """
        with self.averaged():
            self._evaluate(loop)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While this lasts, the detector has the averaged weights, which are what is evaluated and saved, and what
        teaches."""
        with self.averages.applied() if self.averages is not None else contextlib.nullcontext():
            yield

    def _evaluate(self, loop: Loop) -> None:
        assert self.validation is not None
        step = loop.state.step
        self.detector.eval()
        evaluation = evaluate_detector(
            Detector(self.detector.model, self.processor, loop.team.device),
            self.validation,
            batch_size=self.config.eval_batch_size or self.config.batch_size,
            workers=loop.workers,
            each_batch=loop.stop_between_steps,
        )
        self.detector.train()
        record: dict[str, Any] = {"step": step, "epoch": step * self.config.batch_size / self.epoch_size}
        record |= evaluation.metrics.to_dict() | {"thresholds": self.thresholds(evaluation.metrics)}
        earlier = [earlier for earlier in self.records if earlier["step"] < step]
        self._records = [*earlier, record]
        if not loop.team.main:
            return
        overall = evaluation.metrics.overall()
        before = [record["AP"] or 0.0 for record in earlier]
        evaluation.detections.write(self.out / "detections-last.npz")
        self.history.rewind(step - 1)
        self.history.append([record | {"train_loss": self.mean_loss(step)}])
        known = {name: value for name, value in overall.items() if value is not None}
        loop.track({f"val/{name}": value for name, value in known.items()})
        best = (overall["AP"] or 0.0) > max(before, default=-1.0)
        if best:
            self.save("best", step)
            shutil.copyfile(self.out / "detections-last.npz", self.out / "detections-best.npz")
        if loop.bar is not None:
            so_far = "best so far" if best else f"best {percent(max(before))}"
            values = f"AP {percent(overall['AP'])}  AP50 {percent(overall['AP50'])}  ({so_far})"
            loop.bar.say(f"step {step} of {self.steps}: {values}, {loop.bar.left(step)} left")
        if self.teacher is not None:
            self.teacher.report(earlier, self.records)
        self.note_unreadable(evaluation.skipped)
        records = self.history.read()
        write_json(self.out / "metrics.json", {"best": best_of(records), "last": records[-1]})
        loop.callbacks.call("on_evaluation", loop.state.step, known)

    def note_unreadable(self, problems: list[tuple[str, str]]) -> None:
        """List the validation images that could not be read; report them when they are not the same as before."""
        file = self.out / "skipped-validation.jsonl"
        text = "".join(json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in problems)
        if text == (file.read_text(encoding="utf-8") if file.exists() else ""):
            return
        write_text(file, text)
        say(
            f"{len(problems)} of {len(self.validation or ())} validation images cannot be read (listed in {file}): "
            "their boxes count as missed",
        )

    def thresholds(self, metrics: CocoMetrics) -> list[float]:
        """The score of each of the detector's classes at which F1 is highest on the validation images; for those that
        were not found, the median of the others."""
        assert self.validation is not None
        labels = class_map(self.detector.class_names, self.validation.class_names)
        known = [metrics.per_class[label].threshold if label >= 0 else None for label in labels]
        usual = float(np.median([value for value in known if value is not None] or [DEFAULT_THRESHOLD]))
        return [usual if value is None else value for value in known]

    def mean_loss(self, step: int) -> float | None:
        """Mean logged training loss since the evaluation before ``step``."""
        since = max((record["step"] for record in self.history.read() if record["step"] < step), default=0)
        lines = JsonLines(self.out / "log.jsonl").read()
        losses = [line["loss"] for line in lines if "loss" in line and since < line["step"] <= step]
        return sum(losses) / len(losses) if losses else None

    def save(self, name: str, step: int) -> None:
        """Write the detector after ``step`` updates as an ordinary Hugging Face directory of that name, with the
        thresholds of the newest evaluation."""
        provenance = {"finetuned": {"steps": step, "of": self.steps}}
        records = self.history.read()
        if records:
            self.detector.config.score_thresholds = records[-1].get("thresholds")
        self.detector.save(self.out / name, **dataclasses.asdict(self.input_size), provenance=provenance)
        measured = records[-1] if records else None
        write_card(self.out / name, self.detector.provenance, self.images.dataset, self.validation, measured)


def augmented_page(images: TrainingImages) -> Image.Image:
    """Some training images as the first epoch augments them, with their boxes, on one page."""
    chosen = rng(images.seed).permutation(len(images))[:SHOWN].tolist()
    samples = [sample for index in chosen if (sample := images[(0, index)]).pixels is not None]
    page = Image.new("RGB", (SIDE * min(COLUMNS, len(chosen)), SIDE * math.ceil(len(chosen) / COLUMNS)), "white")
    for number, sample in enumerate(samples):
        values = torch.tensor(sample.pixels).permute(2, 0, 1)[None] / 255
        values = jitter_colours(values, torch.from_numpy(sample.jitter)[None])[0]
        pixels = (255 * values).round().byte().permute(1, 2, 0).numpy()
        scale = np.tile(pixels.shape[1::-1], 2)
        boxes = box_convert(torch.from_numpy(sample.boxes), "cxcywh", "xyxy").numpy() * scale
        picture = draw_detections(pixels, boxes, sample.classes, None, images.dataset.class_names)
        picture.thumbnail((SIDE - 4, SIDE - 4))
        page.paste(picture, (SIDE * (number % COLUMNS), SIDE * (number // COLUMNS)))
    return page


def is_due(step: int, steps: int, count: int) -> bool:
    """Whether one of ``count`` evaluations, evenly over ``steps`` updates, is due after update ``step`` (1, 2, ...)."""
    return step * count // steps > (step - 1) * count // steps


def best_of(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation of highest AP, the first of equals."""
    return max(records, key=lambda record: (record.get("AP") or 0.0, -record["step"]))
