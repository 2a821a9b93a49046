"""How long a comparison takes: an estimate before it starts, and a bar with the time left while it runs."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from siamese_detr.comparison.plan import Plan, Task
from siamese_detr.detection.criterion import CriterionConfig, SetCriterion
from siamese_detr.detectors.build import build_detector
from siamese_detr.detectors.structures import Targets
from siamese_detr.errors import UserError
from siamese_detr.kernels import accelerate
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.runtime.progress import ProgressBar

START = 10.0
"""Seconds that a run takes to start and to end."""
FIRST_SHOWN = 0.02
"""Share of the work from which on it says how long the rest takes: before, starting has taken most of the time."""
TRIED = 4
"""Images of a trial step."""


def estimate(plan: Plan, missing: Sequence[Task], slots: int) -> float | None:
    """Seconds that the missing runs take, from a trial step on random pixels.

    Returns:
        None where they run on a GPU, which the comparison itself leaves to its runs, or where the step fails: the runs
        say why.
    """
    config = plan.finetune
    on_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()  # asked without touching it
    if not missing or config.device not in ("auto", "cpu") or (config.device == "auto" and on_gpu):
        return None
    try:
        seconds = seconds_per_image(plan)
    except (UserError, RuntimeError, ValueError):
        return None
    return sum(START + task.work * seconds for task in missing) / slots


def seconds_per_image(plan: Plan) -> float:
    """Of a fine-tuning step of a new detector, on the CPU."""
    config = plan.finetune
    with torch.random.fork_rng():
        options = plan.pretrain
        names = plan.training.class_names
        detector = build_detector(options.detector, options.backbone, class_names=names, seed=0, **options.sizes())
        detector.set_trainable(backbone=config.backbone_lr > 0, class_head=True)
        accelerate(detector, torch.device("cpu"), config.kernels)
        criterion = SetCriterion(CriterionConfig.of(detector.class_loss))
        side = config.image_size or 0
        pixels, mask = torch.rand(TRIED, 3, side, side), torch.ones(TRIED, side, side, dtype=torch.bool)
        targets = Targets(torch.zeros(TRIED, 3, dtype=torch.int64), torch.full((TRIED, 3, 4), 0.3))
        seconds = []
        for _ in range(3):  # the first is slower, and others may keep the machine busy for a moment
            began = time.monotonic()
            criterion(detector(pixels, mask, targets), targets).loss.backward()
            seconds.append(time.monotonic() - began)
    return min(seconds) / TRIED


class Watch:
    """Shows how much of a comparison's work is done. A context.

    Args:
        missing: the runs to be made.
    """

    def __init__(self, missing: Sequence[Task]) -> None:
        self.left = {task.name: task for task in missing}
        self.done, self._looked = 0.0, 0.0
        self.total = sum(task.work for task in missing)
        self.bar = ProgressBar("compare", round(self.total), unit="image")

    def __enter__(self) -> Watch:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def ended(self, name: str) -> None:
        """Count a run as done, however it ended."""
        self.done += self.left.pop(name).work
        self._show()

    def look(self) -> None:
        """Show what the logs of the runs say, once in two seconds at most."""
        if time.monotonic() - self._looked > 2:
            self._looked = time.monotonic()
            self._show()

    def _show(self) -> None:
        done = self.done + sum(task.work * share_done(task) for task in self.left.values())
        if done >= FIRST_SHOWN * self.total:
            self.bar.step(round(done))


def share_done(task: Task) -> float:
    """The part of a run's steps that its log has, from 0 to 1."""
    records = JsonLines(task.run / "log.jsonl").read()
    return min(records[-1].get("step", 0) / task.steps, 1.0) if records and task.steps else 0.0
