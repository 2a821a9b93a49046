"""The verb ``evaluate``: COCO metrics of a detector on labelled images."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from siamese_detr.config import verb
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import CocoMetrics, Detections, coco_metrics
from siamese_detr.evaluation.evaluate_config import EvaluateConfig
from siamese_detr.evaluation.inference import Detector, Job, gather, gather_problems, run
from siamese_detr.files import write_json
from siamese_detr.images.labels import DetectionDataset, read_labels
from siamese_detr.runtime.processes import join, lost_process_explained

# The same things under PASCAL VOC's and COCO's names.
SYNONYMS = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "tvmonitor": "tv",
}


@dataclass
class Evaluation:
    """COCO metrics, the detections they are of, and (path, reason) of images that could not be read (they count as
    missed)."""

    metrics: CocoMetrics
    detections: Detections
    skipped: list[tuple[str, str]] = field(default_factory=list)


@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> CocoMetrics:
    """COCO AP, AP50, AP75, AP by size and AR, overall and per class, of a detector on labelled images.

    Started by torchrun in several processes, these share the images; the metrics are those of one.
    """
    main = join(config.device)
    if config.out is not None and main:
        try:  # now, not after the evaluation
            Path(config.out).absolute().parent.mkdir(parents=True, exist_ok=True)
            if Path(config.out).is_dir():
                raise UserError(f"{config.out} is a folder: name the JSON file to write")
        except OSError as error:
            raise UserError(f"cannot write {config.out}: {error.strerror}; choose another place") from error
    detector = Detector.load(config.model, config.device)
    dataset = read_labels(config.labels, config.images, config.split, default_split="val")
    console = Console(stderr=True, soft_wrap=True, quiet=not main)
    for problem in dataset.problems:
        console.print(f"{config.labels}: {problem}", markup=False, highlight=False)
    with lost_process_explained():
        result = evaluate_detector(
            detector, dataset, batch_size=config.batch_size, workers=config.workers, top_k=config.top_k, progress=True
        )
    if not main:
        return result.metrics
    for path, reason in result.skipped[:5]:
        console.print(f"cannot read {path}: {reason}", markup=False)
    if result.skipped:
        console.print(f"{len(result.skipped)} of {len(dataset)} images could not be read: their boxes count as missed")
    if config.out is not None:
        out = Path(config.out)
        result.metrics.write(out)
        beside = out.with_name(f"{out.stem}.detections.json")
        ids = dataset.category_ids or list(range(len(dataset.class_names)))
        write_json(beside, result.detections.to_coco(ids), indent=None)
        console.print(f"metrics in {out}, detections in {beside}", markup=False)
    Console().print(result.metrics.table())
    return result.metrics


def evaluate_detector(
    detector: Detector,
    dataset: DetectionDataset,
    *,
    batch_size: int = 8,
    workers: int = 0,
    top_k: int = 100,
    progress: bool = False,
    each_batch: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Detect in all images of ``dataset``, share the work among the processes if there are several, and score.

    Every process returns the same metrics. Class indices of the detections are those of ``dataset``. ``each_batch`` is
    called before every batch, equally often in all processes; what it raises ends the evaluation.

    Raises:
        UserError: detector and labels have no class in common, or no image can be read.
    """
    classes = class_map(detector.class_names, dataset.class_names)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    jobs = [Job(image.id, str(image.path), (image.width, image.height)) for image in dataset.images]
    results = run(
        detector,
        jobs,
        batch_size=batch_size,
        workers=workers,
        top_k=top_k,
        rank=rank,
        world=world,
        each_batch=each_batch,
    )
    if progress and rank == 0:
        results = track(
            results,
            "evaluating",
            total=-(-len(jobs) // world),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )  # type: ignore[assignment]
    parts, skipped = [], []
    for result in results:
        if result.problem is not None:
            skipped.append((result.job.path, result.problem))
        else:
            parts.append(result.detections(classes))
    detections = gather(Detections.concatenate(parts), detector.device)
    skipped = gather_problems(skipped, detector.device)
    if len(skipped) == len(jobs):
        raise UserError(f"none of the {len(skipped)} images can be read, e.g. {skipped[0][0]}: {skipped[0][1]}")
    return Evaluation(coco_metrics(dataset.to_coco(), detections), detections, skipped)


def class_map(model_names: list[str], label_names: list[str]) -> np.ndarray:
    """(model classes,) int64: the label index of the class of the same name, −1 for none.

    Names are compared without case, spaces and punctuation, VOC's and COCO's words for the same thing being equal. A
    model whose classes have no names (LABEL_0, …) is taken to have the labels' classes in their order, if their
    number is the same.

    Raises:
        UserError: no class in common.
    """
    index: dict[str, int] = {}
    for k, name in enumerate(label_names):
        index.setdefault(plain(name), k)
    found = np.array([index.get(plain(name), -1) for name in model_names], np.int64)
    exact = {name: k for k, name in enumerate(label_names)}
    for k, name in enumerate(model_names):
        found[k] = exact.get(name, found[k])
    if (found < 0).all():
        if len(model_names) == len(label_names) and all(re.fullmatch(r"LABEL_\d+", name) for name in model_names):
            return np.arange(len(label_names))
        raise UserError(
            f"the detector's classes ({shorten(model_names)}) and the labels' ({shorten(label_names)}) "
            "have no name in common"
        )
    return found


def plain(name: str) -> str:
    letters = re.sub(r"[\W_]+", "", name.lower())
    return SYNONYMS.get(letters, letters)


def shorten(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f", … {len(names)} in all" if len(names) > most else "")
