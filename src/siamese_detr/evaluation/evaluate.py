"""The verb ``evaluate``: COCO metrics of a detector on labelled images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from siamese_detr.config import verb
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import CocoMetrics, Detections, coco_metrics
from siamese_detr.evaluation.evaluate_config import EvaluateConfig
from siamese_detr.evaluation.inference import Detector, gather, run
from siamese_detr.evaluation.results import ImageResult, Job
from siamese_detr.files import write_json
from siamese_detr.images.labels import DetectionDataset, read_labels
from siamese_detr.images.memory import from_memory
from siamese_detr.images.names import class_map
from siamese_detr.messages import output, say, track
from siamese_detr.runtime.processes import join, lost_process_explained


@dataclass
class Evaluation:
    """The outcome of an evaluation.

    Args:
        metrics: COCO metrics in [0, 1].
        detections: from which they were computed; classes are those of the labels.
        skipped: (path, reason) of images that could not be read; their boxes count as missed.
    """

    metrics: CocoMetrics
    detections: Detections
    skipped: list[tuple[str, str]] = field(default_factory=list)


@from_memory("labels")
@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> CocoMetrics:
    """COCO AP, AP50, AP75, AP by size and AR, overall and per class, of a detector on labelled images.

    Several processes started by torchrun share the images; the metrics are those of a single process.

    Returns:
        the metrics, in [0, 1].

    Raises:
        UserError: no usable detector, labels or images, or ``out`` cannot be written.
    """
    main = join(config.device)
    out = Path(config.out) if config.out is not None and main else None
    if out is not None:  # fails now, not after the evaluation
        try:
            out.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose another place") from error
        if out.is_dir():
            raise UserError(f"{out} is a folder; name the JSON file to write")
    detector = Detector.load(config.model, config.device)
    dataset = read_labels(config.labels, config.images, config.split, default_split="val")
    for problem in dataset.problems:
        say(f"{config.labels}: {problem}", main)
    options = {"batch_size": config.batch_size, "workers": config.workers, "top_k": config.top_k}
    with lost_process_explained():
        result = evaluate_detector(detector, dataset, progress=True, **options)
    if not main:
        return result.metrics
    for path, reason in result.skipped[:5]:
        say(f"cannot read {path}: {reason}")
    if result.skipped:
        say(f"{len(result.skipped)} of {len(dataset)} images cannot be read; their boxes count as missed")
    if out is not None:
        result.metrics.write(out)
        beside = out.with_name(f"{out.stem}.detections.json")
        ids = dataset.category_ids or list(range(len(dataset.class_names)))
        write_json(beside, result.detections.to_coco(ids), indent=None)
        say(f"metrics in {out}, detections in {beside}")
    output().print(result.metrics.table())
    return result.metrics


def evaluate_detector(
    detector: Detector,
    dataset: DetectionDataset,
    *,
    progress: bool = False,
    **options: Any,
) -> Evaluation:
    """Detect in all images of ``dataset``, share the work among the processes if there are several, and score.

    Every process returns the same metrics. Class indices of the detections are those of ``dataset``.

    Args:
        detector: its model must be in evaluation mode.
        dataset: labelled images.
        progress: show a progress bar.
        **options: ``batch_size``, ``workers``, ``top_k``, ``each_batch`` of :func:`inference.run`.

    Raises:
        UserError: detector and labels have no class in common, or no image can be read.
    """
    classes = class_map(detector.class_names, dataset.class_names)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    jobs = [Job(image.id, str(image.path), (image.width, image.height)) for image in dataset.images]
    results: Iterable[ImageResult] = run(detector, jobs, rank=rank, world=world, **options)
    if progress and rank == 0:
        results = track(results, "evaluating", -(-len(jobs) // world))
    parts, skipped = [], []
    for result in results:
        if result.problem is not None:
            skipped.append((result.job.path, result.problem))
        else:
            parts.append(result.detections(classes))
    detections, skipped = Detections.concatenate(gather(parts)).sorted(), sorted(gather(skipped))
    if len(skipped) == len(jobs):
        raise UserError(f"none of the {len(skipped)} images can be read, e.g. {skipped[0][0]}: {skipped[0][1]}")
    return Evaluation(coco_metrics(dataset.to_coco(), detections), detections, skipped)
