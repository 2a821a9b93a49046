"""Fine-tuning on labels: the training loop with the set criterion, COCO metrics after every so many steps, best and
last detector."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from siamese_detr.detection.criterion import CriterionConfig, SetCriterion, Targets
from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.evaluation.evaluate import evaluate_detector
from siamese_detr.evaluation.inference import Detector
from siamese_detr.files import write_json, write_text
from siamese_detr.images.labels import DetectionDataset
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.training.compiling import sizes_vary
from siamese_detr.training.labelled_dataset import EpochBatches, TrainingImages, collate, prepare
from siamese_detr.training.settings import RunSettings
from siamese_detr.training.trainer import BaseTrainer


@dataclasses.dataclass(frozen=True)
class InputSize:
    """What the detector's image processor does at evaluation.

    Args:
        shortest_edge: short side in pixels, or the side of the square.
        longest_edge: limit of the long side.
        square: stretch to a square.
    """

    shortest_edge: int
    longest_edge: int
    square: bool


class DetectionTrainer(BaseTrainer):
    """Trains a detector on labelled images.

    Writes ``history.jsonl`` (one line of COCO metrics per evaluation), ``metrics.json`` (the best and the last of
    them), and the Hugging Face directories ``best`` and ``last`` into the run directory.

    Args:
        detector: with the class head that fits ``images``.
        settings: how the run is driven.
        optimizer: over the detector's parameters.
        images: augmented training images.
        validation: labelled images to evaluate on; None: there is no evaluation, and only ``last`` is written.
        input_size: of evaluation, stored with the detector.
        evaluation_batch: images per forward pass in evaluation.
        options: passed on.
    """

    verb = "finetune"

    def __init__(
        self,
        detector: DetectorAdapter,
        settings: RunSettings,
        optimizer: torch.optim.Optimizer,
        images: TrainingImages,
        validation: DetectionDataset | None,
        input_size: InputSize,
        evaluation_batch: int = 8,
        **options: Any,
    ) -> None:
        batches = EpochBatches(
            len(images), settings.batch_size // settings.accumulate, settings.steps * settings.accumulate, settings.seed
        )
        self.detector = detector
        self.criterion = SetCriterion(CriterionConfig.of("focal" if detector.focal else "softmax"))
        self.validation = validation
        self.input_size = input_size
        self.evaluation_batch = evaluation_batch
        self.processor = detector.image_processor(**dataclasses.asdict(input_size))
        self.evaluated = -1  # step of the last evaluation
        self.history = JsonLines(settings.out / "history.jsonl")
        super().__init__(
            detector, settings, optimizer, images, batches, collate, eval_dataset=validation or [], **options
        )
        self.add_callback(_ContinueHistory(self))

    def terms(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Tensor]]:
        pixel_values, pixel_mask = prepare(batch, self.detector.image_mean, self.detector.image_std)
        if self.settings.compile and not self.input_size.square:
            sizes_vary([pixel_values], pixel_mask)
        logits, boxes = model(pixel_values, pixel_mask)
        output = self.criterion(logits, boxes, Targets(batch["classes"], batch["boxes"]))
        return output.loss, output.terms

    def still_unreadable(self, path: str) -> bool:
        images: TrainingImages = self.train_dataset  # type: ignore[assignment]
        index = images.index.get(path)
        return index is not None and images[(0, index)].pixels is None

    def fit(self, resume: bool = False) -> None:
        """Train, evaluate what was not yet evaluated, and write ``last``."""
        super().fit(resume)
        if self.validation is not None and self.evaluated != self.state.global_step:
            self.evaluate()
        if self.args.should_save:
            self.save(self.settings.out / "last")

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """COCO metrics on the validation images, on all processes; the best detector so far is kept.

        Raises:
            Preempted: asked to stop; the run is saved, and evaluates again when it is continued.
        """
        assert self.validation is not None
        step = self.state.global_step
        self.detector.eval()
        found = evaluate_detector(
            Detector(self.detector.model, self.processor, self.args.device),
            self.validation,
            batch_size=self.evaluation_batch,
            workers=self.settings.workers,
            each_batch=self.stop_between_steps,
        )
        self.detector.train()
        overall = found.metrics.overall()
        if self.args.should_save:
            before = [record["AP"] or 0.0 for record in self.history.rewind(step - 1)]
            record: dict[str, Any] = {"step": step, "epoch": step * self.settings.batch_size / self.epoch_size}
            record |= {"train_loss": self.mean_loss(step), **found.metrics.to_dict()}
            self.history.append([record])
            if self.journal is not None:
                for name, value in overall.items():
                    if value is not None:
                        self.journal.board.add_scalar(f"validation/{name}", value, step)
            if (overall["AP"] or 0.0) > max(before, default=-1.0):
                self.save(self.settings.out / "best")
            self.note_unreadable(found.skipped)
            records = self.records()
            write_json(self.settings.out / "metrics.json", {"best": best_of(records), "last": records[-1]})
        self.evaluated = step
        metrics = {f"eval_{name}": value for name, value in overall.items() if value is not None}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def note_unreadable(self, problems: list[tuple[str, str]]) -> None:
        """List the validation images that could not be read; tell of them when they are others than before."""
        file = self.settings.out / "skipped-validation.jsonl"
        text = "".join(json.dumps({"path": path, "reason": reason}) + "\n" for path, reason in problems)
        if text == (file.read_text(encoding="utf-8") if file.exists() else ""):
            return
        write_text(file, text)
        print(
            f"{len(problems)} of {len(self.validation or ())} validation images cannot be read (listed in {file}): "
            "their boxes count as missed",
            file=sys.stderr,
        )

    def records(self) -> list[dict[str, Any]]:
        """The evaluations so far."""
        return self.history.read()

    def mean_loss(self, step: int) -> float | None:
        """Mean logged training loss since the evaluation before ``step``."""
        since = max((record["step"] for record in self.records() if record["step"] < step), default=0)
        lines = JsonLines(self.settings.out / "log.jsonl").read()
        losses = [line["loss"] for line in lines if "loss" in line and since < line["step"] <= step]
        return sum(losses) / len(losses) if losses else None

    def save(self, directory: Path) -> None:
        """Write the detector as an ordinary Hugging Face directory."""
        self.detector.save(
            directory,
            **dataclasses.asdict(self.input_size),
            provenance={"finetuned": {"steps": self.state.global_step, "of": self.settings.steps}},
        )


def best_of(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The evaluation of highest AP, the first of equals."""
    return max(records, key=lambda record: (record.get("AP") or 0.0, -record["step"]))


class _ContinueHistory(transformers.TrainerCallback):
    """A resumed run evaluates again what lies behind its checkpoint, and first what a stop cut short at it."""

    def __init__(self, trainer: DetectionTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if trainer.replaying:
            return
        missing = False
        if state.is_world_process_zero:
            records = trainer.history.rewind(step)
            missing = step > 0 and trainer.settings.evaluates_at(step) and step not in {r["step"] for r in records}
        if trainer._across(torch.tensor([float(missing)]))[0]:
            trainer.evaluate()
