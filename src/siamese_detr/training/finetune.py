"""The verb ``finetune``: a detector and labels -> a fine-tuned detector, with its metrics on validation images."""

from __future__ import annotations

import contextlib
import hashlib
import html
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from siamese_detr.config import verb
from siamese_detr.detectors.adapter import DetectorAdapter
from siamese_detr.detectors.build import build_detector
from siamese_detr.detectors.loading import load_detector, open_detector
from siamese_detr.detectors.weights import quiet
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import CocoMetrics
from siamese_detr.files import write_json
from siamese_detr.images.labels import DetectionDataset, dataset_key, read_labels
from siamese_detr.images.listing import list_images
from siamese_detr.images.memory import from_memory
from siamese_detr.images.names import class_map
from siamese_detr.messages import output, say
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.runtime.lock import locked
from siamese_detr.runtime.processes import Team, lost_process_explained, meet
from siamese_detr.runtime.rundir import begin, check_place, check_session
from siamese_detr.training.checks import check_callbacks, check_precision, check_trackers
from siamese_detr.training.detection_task import DetectionTask, best_of
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.labelled_dataset import TrainingImages, repeat_factors
from siamese_detr.training.loop import Loop
from siamese_detr.training.nonfinite import replay
from siamese_detr.training.optimizer import adamw
from siamese_detr.training.source import checksum
from siamese_detr.training.task import Callback


@dataclass
class FinetuneResult:
    """What fine-tuning gave.

    Args:
        out: the run directory; ``out/best`` and ``out/last`` are the detectors.
        metrics: the best evaluation's COCO metrics (AP, AP50, … in [0, 1]); empty without validation labels.
        last: the last evaluation's.
        history: every evaluation: step, epoch, train_loss, the metrics, and those of each class.
        skipped: images that could not be read (listed in ``skipped.jsonl``).
        replay: with ``replay``: what was found.
    """

    out: Path
    metrics: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0
    replay: str | None = None

    def _repr_html_(self) -> str:
        table = CocoMetrics.from_dict(best_of(self.history))._repr_html_() if self.history else ""
        return f"<p>{html.escape(str(self.out))}</p>{table}"


@from_memory("train", "val", "unlabelled")
@verb(FinetuneConfig)
def finetune(config: FinetuneConfig, *, callbacks: Sequence[Callback] = ()) -> FinetuneResult:
    """Train a detector on labels, from a pre-trained detector or from scratch, and measure it on validation images.

    Killed at any moment, the same command with --resume continues exactly. On SIGTERM or SIGUSR1 the run saves itself
    and exits with code 75.

    Args:
        callbacks: objects that follow the run, see :class:`siamese_detr.training.task.Callback`.

    Returns:
        where the detectors are, and all evaluations.

    Raises:
        UserError: bad input or a run that cannot go on; one line with the remedy.
        Preempted: asked to stop; the run is saved (a SystemExit with code 75).
    """
    out = Path(config.out)
    team = Team(meet(config.device))
    check_precision(config.precision, team.device, team.main)
    check_trackers(config.report_to)
    check_callbacks(callbacks)
    dataset = read_labels(config.train, config.train_images)
    validation = None
    if config.find_validation():
        validation = read_labels(str(config.val), config.val_images, default_split="val")
    for source, read in ((config.train, dataset), (config.val, validation)):
        for problem in read.problems if read is not None else ():
            say(f"{problem.where or source}: {problem}", team.main)
    dataset = dataset.take(config.fraction, config.seed)
    unlabelled = list_images(config.unlabelled, without=out) if config.unlabelled is not None else None
    for left_out in unlabelled.problems[:3] if unlabelled is not None else ():
        say(f"left out: {left_out}", team.main)
    if validation is not None:
        known = class_map(dataset.class_names, validation.class_names)  # fails now, not after hours of training
        counts = validation.class_counts()[:, 0]
        alien = [name for k, name in enumerate(validation.class_names) if k not in known and counts[k]]
        if alien:
            text = f"classes without training labels are not evaluated: {', '.join(alien)}"
            say(f"{config.val}: {text}", team.main)
    detector, origin = starting_detector(config, dataset.class_names)
    detector.set_trainable(backbone=config.backbone_lr > 0, class_head=True)
    freeze(detector, config.freeze)
    size = config.input_size(detector)
    optimizer = adamw(
        detector,
        config.lr,
        config.weight_decay,
        config.decay_all,
        backbone=detector.backbone,
        backbone_lr=config.backbone_lr,
        layer_decay=config.layer_decay,
    )
    with lost_process_explained(), contextlib.ExitStack() as stack:
        if team.main and config.replay is None:
            check_place(out)
            stack.enter_context(locked(out))
            begin(out, config)
            labels = {"training labels": dataset_key(dataset)}
            labels["validation labels"] = dataset_key(validation) if validation is not None else ""
            if unlabelled is not None:
                paths = "\n".join(unlabelled.paths).encode(errors="surrogateescape")
                labels["unlabelled images"] = hashlib.sha256(paths).hexdigest()
            check_session(out, {"images": len(dataset), **labels, "starting detector": starting_key(detector, origin)})
            boxes, pseudo_labels = map(int, (dataset.class_counts()[:, 0].sum(), dataset.pseudo_counts().sum()))
            write_json(out / "start.json", origin | {"boxes": boxes, "pseudo_labels": pseudo_labels})
            if config.fraction < 1:
                write_json(out / "train.json", dataset.to_coco(original_ids=True))
        say(describe(origin, dataset, validation), team.main)
        repeats = repeat_factors(dataset, config.repeat_factor)
        say(config.budget(round(repeats.sum())), team.main)
        steps = config.total_steps(round(repeats.sum()))
        images = TrainingImages(dataset, config.transform(size), config.seed)
        task = DetectionTask(detector, config, steps, images, validation, size, unlabelled, repeats)
        often = min(math.ceil(steps / max(task.evaluations, 1)), 500)
        loop = Loop(task, config, optimizer, config, team, steps, often, callbacks)
        if config.replay is not None:
            diagnosis = replay(loop, Path(config.replay))
            say(diagnosis, team.main)
            return FinetuneResult(out, replay=diagnosis)
        loop.run()
        if team.main:
            with task.averaged():
                task.save("last", loop.state.step)
    result = read_result(out)
    if result.history:
        best = best_of(result.history)
        if team.main:
            output().print(CocoMetrics.from_dict(best).table())
        say(
            f"AP {100 * (best['AP'] or 0):.1f}  AP50 {100 * (best['AP50'] or 0):.1f} at epoch {best['epoch']:.1f} of "
            f"{result.history[-1]['epoch']:.1f}: {out / 'best'}",
            team.main,
        )
    else:
        say(f"the detector: {out / 'last'}", team.main)
    say(f"look at what it finds: siamese-detr predict --model {out} --images PHOTOS --out PICTURES", team.main)
    return result


def read_result(out: Path) -> FinetuneResult:
    """What the run directory says of the run."""
    history = JsonLines(out / "history.jsonl").read()
    skipped = len({record["path"] for record in JsonLines(out / "skipped.jsonl").read()})
    if not history:
        return FinetuneResult(out, skipped=skipped)
    return FinetuneResult(out, overall(best_of(history)), overall(history[-1]), history, skipped)


def overall(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith(("AP", "AR")) and value is not None}


def starting_detector(config: FinetuneConfig, class_names: list[str]) -> tuple[DetectorAdapter, dict[str, Any]]:
    """The detector before the first step, and a record of where its tensors come from."""
    if config.start is None:
        detector = build_detector(
            config.detector, config.backbone, class_names=class_names, seed=config.seed, **config.sizes()
        )
        return detector, {"from": "scratch", "detector": config.detector, "backbone": config.backbone}
    with torch.random.fork_rng(), quiet(), warnings.catch_warnings(action="ignore"):  # the report says it
        torch.manual_seed(config.seed)
        stored = open_detector(config.start)
        share = config.kept_share if stored.only_pretrained else 1.0
        detector = load_detector(stored, class_names, **config.dropouts())
        if share < 1:
            detector.shrink_and_perturb(share)
        added = detector.complete()
    report = detector.load_report
    tensors = len(detector.model.state_dict())
    made = {"class_head": list(report.remade), "missing": [*report.missing, *added], "ignored": list(report.unexpected)}
    kept = tensors - len(made["class_head"]) - len(made["missing"])
    return detector, {"from": str(stored.path), "kept": kept, "kept_share": share, **made}


def freeze(detector: DetectorAdapter, parts: Sequence[str]) -> None:
    """Let the modules of these names, such as ``decoder.layers.0`` or ``backbone``, not learn.

    Raises:
        UserError: there is none of such a name, or nothing is left to learn.
    """
    parameters = dict(detector.named_parameters())
    for part_name in parts:
        inside = [parameter for name, parameter in parameters.items() if f".{part_name}." in f".{name}."]
        if not inside:
            known = sorted({name.split(".")[2] for name in parameters if name.count(".") > 2})
            raise UserError(
                f"freeze: the detector has no part {part_name!r}; its parts are {', '.join(known)} and what is in them"
            )
        if part_name == "backbone":
            detector.backbone_trainable = False
        for parameter in inside:
            parameter.requires_grad_(False)
    if not detector.trainable_names():
        raise UserError(f"freeze {' '.join(parts)} leaves nothing to learn: freeze less")


def starting_key(detector: DetectorAdapter, origin: dict[str, Any]) -> str:
    """Hash of what was kept of the detector started from; of a new one, which the settings tell, there is none."""
    if origin["from"] == "scratch":
        return ""
    return checksum(detector.model, without={*origin["class_head"], *origin["missing"]})


def describe(origin: dict[str, Any], dataset: DetectionDataset, validation: DetectionDataset | None) -> str:
    boxes, pseudo = int(dataset.class_counts()[:, 0].sum()), int(dataset.pseudo_counts().sum())
    found = f" ({pseudo} pseudo-labels)" if pseudo else ""
    lines = [f"{len(dataset)} training images, {boxes} boxes{found}, {len(dataset.class_names)} classes"]
    if validation is not None:
        lines[0] += f"; {len(validation)} validation images in {validation.root}"
    else:
        lines[0] += "; no validation labels (--val): nothing will be measured, and only last/ be written"
    if origin["from"] == "scratch":
        lines.append(f"from scratch: {origin['detector']} on {origin['backbone']}")
    else:
        lines.append(f"from {origin['from']}: {origin['kept']} tensors kept")
        if origin["kept_share"] < 1:
            lines[-1] += f", {100 * origin['kept_share']:g} % of each and the rest new initial values"
        for name, label in (("class_head", "re-made"), ("missing", "not in the file, fresh"), ("ignored", "ignored")):
            if origin[name]:
                lines[-1] += (
                    f"; {len(origin[name])} {label} ({', '.join(origin[name][:2])}{', …' * (len(origin[name]) > 2)})"
                )
    return "\n".join(lines)
