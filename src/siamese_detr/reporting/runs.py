"""The common parts of a run's page: its configuration and versions, and the curves of its log."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from siamese_detr.comparison.summary import Curve
from siamese_detr.errors import UserError
from siamese_detr.images.listing import existing
from siamese_detr.reporting.charts import line_chart, plain_curve
from siamese_detr.reporting.page import Block, Code, Facts, Grid, Missing, Section
from siamese_detr.runtime.journal import JsonLines

AXES = {"step", "epoch", "seconds"}
L1_EXPLAINED = "How far predicted boxes are off in centre, width and height, as fractions of the image. 0 is perfect."
GIOU_EXPLAINED = "How little predicted boxes overlap their targets. 0 is a perfect fit; above 1 they lie apart."
TERMS = {
    "loss": ("Total loss (weighted)", "What training minimises: the weighted sum of all terms of all decoder layers."),
    "loss_class": ("Class loss", "Whether queries on an object score its class highest, others none. 0 is perfect."),
    "loss_box": ("Boxes: L1", L1_EXPLAINED),
    "loss_giou": ("Boxes: 1 − GIoU", GIOU_EXPLAINED),
    "loss_region": ("Region discrimination", "Distance of the decoder's features of regions to the frozen backbone's "
                    "features of them. 0: equal; 2: unrelated."),
    "loss_global": ("Global discrimination", "Distance of the encoder's global features of the two views. 0: equal; "
                    "2: unrelated."),
    "loss_embedding": ("Object embedding", "Distance of the decoder's embeddings of objects to the frozen backbone's."),
    "loss_auxiliary": ("All earlier decoder layers", "Weighted sum of the terms over all layers before the last."),
    "loss_denoising": ("Denoising", "Weighted sum of the terms of the queries that recover labels from noisy copies."),
    "loss_local": ("Edge distributions", "Weighted sum of the losses of where each edge of a box lies."),
    "learning_rate": ("Learning rate", "The step size of the optimiser."),
    "grad_norm": ("Gradient norm, before clipping", "Jumps and non-finite values are signs of trouble."),
    "pseudo_boxes": ("Pseudo-labels per image", "Boxes that the averaged detector found on an unlabelled image."),
    "pseudo_correct": ("Correct pseudo-labels per image", "How many of them overlap a label of their class by half; "
                       "where the unlabelled images happen to have labels, which training does not use."),
    "padded_regions": ("Padded regions per image", "Jittered copies of other regions, where proposals are too few."),
}  # fmt: skip
"""Title and explanation of each logged number, for a first-time reader."""
AP_EXPLAINED = (
    "AP (average precision) is COCO's measure of a detector. It is high if many labelled boxes are found and few other "
    "boxes are predicted, averaged over classes and over ten IoU thresholds (0.50 to 0.95). 100 % is perfect. AP50 and "
    "AP75 use one IoU threshold, 0.50 or 0.75."
)
PATHS = ("images", "proposals", "val", "train_images", "val_images", "model", "init", "backbone")
POINTS = 160
"""Largest number of points of a curve; longer logs are averaged over equal spans."""


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that a run started with.

    Raises:
        UserError: there is none.
    """
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        existing(run)
        raise UserError(
            f"{run} is not a run directory: it has no readable config.yaml; give the output directory of pretrain, "
            "finetune or compare"
        ) from error
    if not isinstance(values, dict):
        raise UserError(
            f"{run / 'config.yaml'} is not a configuration; give the output directory of pretrain, finetune or compare"
        )
    return values


def located(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with existing paths made valid here: relative ones start where the run was started."""
    started = next(
        (record["directory"] for record in JsonLines(run / "sessions.jsonl").read() if "directory" in record), ""
    )
    paths = {name: str(Path(started, config[name]).expanduser()) for name in PATHS if config.get(name)}
    return {**config, **{name: path for name, path in paths.items() if Path(path).exists()}}


def what_was_run(run: Path, facts: Mapping[str, str], config: Mapping[str, Any]) -> Section:
    """Facts, versions and the whole configuration."""
    sessions = JsonLines(run / "sessions.jsonl").read()
    shown = dict(facts)
    blocks: list[Block] = []
    if sessions:
        last = sessions[-1]
        shown["started"] = str(sessions[0].get("started", "unknown"))
        shown["sessions"] = f"{len(sessions)}" + (" (resumed)" if len(sessions) > 1 else "")
        shown["hardware"] = str(last.get("accelerator") or f"{last.get('cores', '?')} CPU cores")
        shown["siamese-detr"] = str(last.get("siamese_detr", "unknown"))
        shown["Python"] = str(last.get("python", "unknown"))
        packages = last.get("packages") or {}
        shown |= {name: str(packages[name]) for name in ("torch", "torchvision", "transformers") if name in packages}
    else:
        blocks.append(Missing("Versions", "the run recorded no session (sessions.jsonl)"))
    skipped = JsonLines(run / "skipped.jsonl").read()
    paths = list(dict.fromkeys(str(record.get("path")) for record in skipped))
    shown["unreadable images"] = f"{len(paths)}" + (f", for example {paths[0]}" if paths else "")
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return Section("What was run", [Facts(shown), *blocks, Code("The complete configuration", text)])


def log_section(run: Path) -> Section:
    """A chart for each loss term (one curve per decoder layer), then learning rate and gradient norm."""
    records = [record for record in JsonLines(run / "log.jsonl").read() if "step" in record]
    if not records:
        return Section("Curves", [Missing("Curves", "log.jsonl is missing or empty")])
    names = list(dict.fromkeys(name for record in records for name in record if name not in AXES))
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)_(\d+)", name)
        base = match[1] if match and match[1] in names else name
        groups.setdefault(base, []).append(name)
    order = [name for name in TERMS if name in groups] + sorted(groups.keys() - TERMS.keys())
    figures = []
    for base in order:
        layers = sorted((n for n in groups[base] if n != base), key=lambda n: int(n.rpartition("_")[2]))
        curves = [read_curve(records, name, f"layer {i}") for i, name in enumerate(layers, 1)]
        curves.append(read_curve(records, base, f"layer {len(layers) + 1} (last)" if layers else base))
        curves = [curve for curve in curves if curve.x]
        if curves:
            title, explanation = TERMS.get(base, (base, ""))
            figures.append(line_chart(title, "step", "", curves, explanation))
    return Section("Curves", [Grid(figures, 330)])


def read_curve(records: Sequence[Mapping[str, Any]], name: str, label: str) -> Curve:
    """A logged number against the step, averaged over spans if there are many."""
    points = [(float(r["step"]), float(r[name])) for r in records if isinstance(r.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    span = max(math.ceil(len(points) / POINTS), 1)
    groups = [points[i : i + span] for i in range(0, len(points), span)]
    return plain_curve(label, [(group[-1][0], fmean(value for _, value in group)) for group in groups])
