"""The page of a fine-tuning run: metrics, curves, per-class results, confusion, best and worst predictions."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.comparison.plots import COLOURS as SERIES
from siamese_detr.comparison.summary import Curve
from siamese_detr.errors import ImageError, UserError
from siamese_detr.evaluation.analysis import (
    NO_ROWS,
    confusion_matrix,
    image_quality,
    rows_by_image,
)
from siamese_detr.evaluation.coco import ClassMetrics, Detections, coco_metrics, percent
from siamese_detr.evaluation.evaluate import evaluate_detector
from siamese_detr.evaluation.inference import DEFAULT_THRESHOLD, Detector
from siamese_detr.images.decode import read_image
from siamese_detr.images.labels import DetectionDataset, LabelledImage, dataset_key, read_labels
from siamese_detr.reporting.charts import bar_chart, line_chart, plain_curve
from siamese_detr.reporting.page import Block, Figure, Grid, Heading, Missing, Page, Section, Table, Text
from siamese_detr.reporting.pictures import COLOURS, Album, Box
from siamese_detr.reporting.runs import AP_EXPLAINED, located, log_section, read_config, what_was_run
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.runtime.rundir import sessions
from siamese_detr.training.detection_task import best_of

IOU = 0.5
AT_LEAST = "scores from the threshold on"


def finetuning_page(run: Path, samples: int, max_images: int, threshold: float | None, device: str) -> Page:
    """The page of the fine-tuning run in ``run``; for the other parameters see ``ReportConfig``."""
    config = read_config(run)
    album = Album()
    history = JsonLines(run / "history.jsonl").read()
    start = config.get("model") or config.get("init") or f"scratch ({config.get('backbone')})"
    facts = {"started from": str(start), "training labels": training_labels(run, config)}
    facts |= {name: str(config.get(name)) for name in ("fraction", "epochs", "batch_size", "lr", "backbone_lr", "seed")}
    sections = [what_was_run(run, facts, config), Section("Results", result_blocks(history)), log_section(run)]
    try:
        dataset, per_class, detections, name = detect(run, config, max_images, device)
    except UserError as error:
        sections.append(Section("Classes and pictures", [Missing("Per-class results and pictures", str(error))]))
    else:
        note = f"Measured on {len(dataset)} validation images with the detector in {name}."
        sections.append(Section("Classes", [Text(note), *class_blocks(per_class)]))
        limits = [threshold if threshold is not None else row.threshold or DEFAULT_THRESHOLD for row in per_class]
        shown = detections.above(np.array(limits))
        sections.append(Section("Confusion", confusion_blocks(dataset, shown)))
        sections.append(Section("Best and worst", picture_blocks(dataset, shown, samples, album)))
    summary = "No evaluation was recorded."
    if history:
        best = best_of(history)
        summary = (
            f"Best AP {percent(best.get('AP'))} % at epoch {best['epoch']:.1f} of {history[-1]['epoch']:.1f}; "
            f"at the end {percent(history[-1].get('AP'))} %."
        )
    return Page(f"Fine-tuning from {Path(str(start)).name}", summary, sections, album.markup())


def training_labels(run: Path, config: Mapping[str, Any]) -> str:
    """The label sources, and how many of their boxes are pseudo-labels."""
    sources = config.get("train")
    text = ", ".join(sources) if isinstance(sources, list) else str(sources)
    with contextlib.suppress(OSError, ValueError):  # of a run that did not begin
        counts = json.loads((run / "start.json").read_text(encoding="utf-8"))
        if counts.get("pseudo_labels"):
            text += f" ({counts['pseudo_labels']} of {counts['boxes']} boxes are pseudo-labels)"
    return text


def result_blocks(history: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not history:
        return [Missing("Results", "no evaluation was recorded (history.jsonl is missing or empty)")]
    best = best_of(history)
    names = [n for n in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100") if n in best]
    rows = [
        [f"{label}, epoch {record['epoch']:.1f}", *(percent(record.get(name)) for name in names)]
        for label, record in (("best", best), ("last", history[-1]))
    ]
    curves = []
    for name in ("AP", "AP50", "AP75"):
        points = [(float(r["epoch"]), 100 * r[name]) for r in history if r.get(name) is not None]
        curves.append(plain_curve(name, points))
    return [
        Text(AP_EXPLAINED),
        Table(
            "COCO metrics on the validation labels, in percent (–: no boxes of this size)", ["evaluation", *names], rows
        ),
        Grid([line_chart("Metrics against epochs", "epoch", "%", [c for c in curves if c.x])], 330),
    ]


def detect(
    run: Path, config: Mapping[str, Any], max_images: int, device: str
) -> tuple[DetectionDataset, list[ClassMetrics], Detections, str]:
    """Validation images (at most ``max_images``), per-class metrics, detections and name of the best detector.

    Raises:
        UserError: no validation labels, no detector, or images that cannot be read.
    """
    if config.get("val") in (None, "none"):
        raise UserError("the run had no validation labels")
    config = located(run, config)
    dataset = read_labels(config["val"], config.get("val_images"), default_split="val")
    directory = run / "best" if (run / "best").is_dir() else run / "last"
    detections = stored_detections(run, dataset, directory.name)
    if len(dataset) > max_images:
        dataset = dataset.take(max_images / len(dataset), 0)
    if detections is not None:
        detections = detections.of_images([image.id for image in dataset.images])
        return dataset, coco_metrics(dataset.to_coco(), detections).per_class, detections, directory.name
    evaluation = evaluate_detector(Detector.load(directory, device), dataset, progress=True)
    return dataset, evaluation.metrics.per_class, evaluation.detections, directory.name


def stored_detections(run: Path, dataset: DetectionDataset, name: str) -> Detections | None:
    """What the run found in its validation images, if they still have the labels that it saw."""
    seen = {session.get("validation labels") for session in sessions(run)}
    if seen != {dataset_key(dataset)}:
        return None
    with contextlib.suppress(OSError, ValueError):
        return Detections.read(run / f"detections-{name}.npz")
    return None


def class_blocks(metrics: Sequence[ClassMetrics]) -> list[Block]:
    """AP per class and precision–recall curves of the classes with most boxes."""
    ordered = sorted(metrics, key=lambda row: -row.boxes)
    values = [row.ap for row in ordered]
    names = [f"{row.name} ({row.boxes})" for row in ordered]
    figures = [bar_chart("AP per class (boxes)", "AP (%)", names, values, "In brackets: number of labelled boxes.")]
    curves = [row for row in ordered if row.boxes]
    shown = curves[: len(SERIES)]
    left_out = f" of the {len(shown)} classes with most boxes" if len(curves) > len(shown) else ""
    figures.append(
        line_chart(
            f"Precision against recall at IoU {IOU}",
            "recall (%)",
            "precision (%)",
            [pr_curve(curve) for curve in shown],
            caption="From left to right, detections of lower scores are added: more labelled boxes are found (recall), "
            f"and fewer detections are correct (precision). Curves{left_out} end at the highest recall reached.",
        )
    )
    return [Grid(figures, 330)]


def pr_curve(row: ClassMetrics) -> Curve:
    """Precision at IoU 0.50 against recall, both in percent, up to the highest recall reached."""
    precision = [100 * value for value in row.precision50 if value > 0] or [0.0]
    return plain_curve(row.name, [(float(recall), value) for recall, value in enumerate(precision)])


def confusion_blocks(dataset: DetectionDataset, detections: Detections) -> list[Block]:
    matrix = confusion_matrix(dataset, detections, IOU)
    if matrix.sum() == matrix[:, -1].sum():
        return [Missing("Confusion matrix", "no detection scores high enough; give a lower --threshold")]
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    names = [*dataset.class_names, "background"]
    rows = [[name, *(str(n) if n else "·" for n in line)] for name, line in zip(names, matrix.tolist(), strict=True)]
    shade = {(i, j + 1): float(share[i, j]) for i in range(len(names)) for j in range(len(names)) if matrix[i, j]}
    text = (
        f"Rows: labelled class; columns: predicted class (IoU at least {IOU}; {AT_LEAST}). Last column: "
        "missed boxes; last row: predictions without a labelled box. Darker: a larger part of the row."
    )
    headers = ["labelled \\ predicted", *dataset.class_names, "missed"]
    return [Text(text), Table("Confusion matrix (numbers of boxes)", headers, rows, shade=shade)]


def picture_blocks(dataset: DetectionDataset, detections: Detections, samples: int, album: Album) -> list[Block]:
    by_image = rows_by_image(detections)
    scored = [
        (quality, image)
        for image in dataset.images
        if (~image.crowd).any()
        and (quality := image_quality(image, detections, by_image.get(image.id, NO_ROWS), IOU)) is not None
    ]
    if not scored:
        return [Missing("Pictures", "no validation image has a labelled box")]
    scored.sort(key=lambda pair: (-pair[0], pair[1].id))
    best = scored[:samples]
    worst = [pair for pair in reversed(scored) if pair[1].id not in {image.id for _, image in best}][:samples]
    blocks: list[Block] = [
        Text(
            "Ordered by panoptic quality: summed IoU of correct detections / (correct + ½ wrong + ½ missed). "
            f"Solid: predictions with their scores ({AT_LEAST}); dashed white: labels."
        )
    ]
    for title, pairs in (("Best", best), ("Worst", worst)):
        figures = []
        for quality, image in pairs:
            with contextlib.suppress(ImageError):  # readable when evaluated; leave it out if it no longer is
                rows = by_image.get(image.id, NO_ROWS)
                figures.append(picture(image, quality, dataset.class_names, detections, rows, album))
        if figures:
            blocks += [Heading(title), Grid(figures, 260)]
    return blocks


def picture(
    image: LabelledImage,
    quality: float,
    names: Sequence[str],
    detections: Detections,
    rows: np.ndarray,
    album: Album,
) -> Figure:
    photo = album.add(read_image(image.path, min_side=album.longest), (image.width, image.height))
    drawn = predicted_boxes(names, detections, rows)
    truth = [Box(box.tolist(), "#ffffff", dashed=True) for box in image.boxes[~image.crowd]]
    labelled = labelled_objects(image, names)
    predicted = ", ".join(box.tag for box in drawn) or "nothing"
    alt = f"Photograph {image.path.name}. Labelled: {labelled}. Predicted: {predicted}."
    return photo.draw([*drawn, *truth], alt, f"{image.path.name}: quality {quality:.2f}; labelled {labelled}")


def predicted_boxes(names: Sequence[str], detections: Detections, rows: Sequence[int] | np.ndarray) -> list[Box]:
    """Those rows of ``detections`` with class and score, in the colours of their classes."""
    boxes = []
    for row in rows:
        label = int(detections.classes[row])
        tag = f"{names[label]} {100 * detections.scores[row]:.0f}%"
        boxes.append(Box(detections.boxes[row].tolist(), COLOURS[label % (len(COLOURS) - 1)], tag))
    return boxes


def labelled_objects(image: LabelledImage, names: Sequence[str]) -> str:
    """For people: ``cat, 2 × dog``."""
    counts = Counter(names[int(k)] for k in image.classes[~image.crowd])
    return ", ".join(name if count == 1 else f"{count} × {name}" for name, count in counts.items())
