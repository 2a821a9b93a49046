"""What every run's page begins with: what was run, on what, and the curves of its log."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from siamese_detr.compare.summary import Curve
from siamese_detr.errors import UserError
from siamese_detr.images.listing import existing
from siamese_detr.reporting.charts import line_chart
from siamese_detr.reporting.page import Block, Code, Facts, Grid, Missing, Section
from siamese_detr.runtime.journal import JsonLines

AXES = {"step", "epoch", "seconds"}
NAMES = {
    "loss": "Total loss (weighted)",
    "loss_class": "Class loss",
    "loss_box": "Boxes: L1",
    "loss_giou": "Boxes: 1 − GIoU",
    "loss_region": "Region discrimination",
    "loss_global": "Global discrimination",
    "loss_embedding": "Object embedding",
    "loss_auxiliary": "All earlier decoder layers",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm, before clipping",
    "padded_regions": "Padded regions per image",
}
EXPLAINED = {
    "loss": "What training lowers: the sum of the terms, each with its weight, over all decoder layers.",
    "loss_class": "Whether queries on an object score its class highest, and the others no class. 0 is perfect.",
    "loss_box": "How far predicted boxes are off, in centre, width and height, as shares of the picture. 0 is perfect.",
    "loss_giou": "How little predicted boxes overlap their targets. 0 is a perfect fit, above 1 they lie apart.",
    "loss_region": "How far what the decoder says a region looks like is from the frozen backbone's feature of it. "
    "0 is the same, 2 unrelated.",
    "loss_global": "How far the encoder's summaries of the two views are apart. 0 is the same, 2 unrelated.",
    "loss_embedding": "How far the decoder's embedding of an object is from the frozen backbone's. 0 is the same.",
    "loss_auxiliary": "The same three terms of every decoder layer before the last, weighted and summed.",
    "learning_rate": "How far each update moves the weights.",
    "grad_norm": "How strongly a batch asks the weights to change. Jumps, or values that are not finite, mean trouble.",
    "padded_regions": "Moved copies of other regions, in images with fewer proposals than regions are wanted. 0: none.",
}
"""For whoever sees these curves for the first time."""
AP_EXPLAINED = (
    "AP, average precision, is COCO's measure of a detector: how many of the labelled boxes it finds, and how few "
    "others, averaged over classes and over ten demands on the overlap (IoU 0.50 to 0.95). 100 % is perfect. AP50 and "
    "AP75 ask for one overlap only, 0.50 and 0.75."
)
PATHS = ("images", "proposals", "train", "val", "train_images", "val_images", "model", "init", "backbone")
POINTS = 160
"""Most points of a curve: longer logs are averaged over equal spans."""


def read_config(run: Path) -> dict[str, Any]:
    """The configuration a run began with.

    Raises:
        UserError: there is none.
    """
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        existing(run)
        raise UserError(
            f"{run} holds no run: it has no config.yaml that can be read; name a directory that pretrain, finetune or "
            "compare wrote"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{run / 'config.yaml'} holds no configuration")
    return values


def located(run: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with paths that are found from here: relative ones count from where the run was started."""
    begun = next(
        (record["directory"] for record in JsonLines(run / "sessions.jsonl").read() if "directory" in record), ""
    )
    found = {name: str(Path(begun, config[name]).expanduser()) for name in PATHS if config.get(name)}
    return {**config, **{name: path for name, path in found.items() if Path(path).exists()}}


def what_was_run(run: Path, facts: Mapping[str, str], config: Mapping[str, Any]) -> Section:
    """Facts, versions and the whole configuration."""
    sessions = JsonLines(run / "sessions.jsonl").read()
    shown = dict(facts)
    blocks: list[Block] = []
    if sessions:
        last = sessions[-1]
        shown["begun"] = str(sessions[0].get("started", "unknown"))
        shown["sessions"] = f"{len(sessions)}" + (" (it was continued)" if len(sessions) > 1 else "")
        shown["hardware"] = str(last.get("accelerator") or f"{last.get('cores', '?')} CPU cores")
        shown["siamese-detr"] = str(last.get("siamese_detr", "unknown"))
        shown["Python"] = str(last.get("python", "unknown"))
        packages = last.get("packages") or {}
        shown |= {name: str(packages[name]) for name in ("torch", "torchvision", "transformers") if name in packages}
    else:
        blocks.append(Missing("Versions", "the run recorded no session (sessions.jsonl)"))
    skipped = JsonLines(run / "skipped.jsonl").read()
    paths = list(dict.fromkeys(str(record.get("path")) for record in skipped))
    shown["unreadable images met"] = f"{len(paths)}" + (f", e.g. {paths[0]}" if paths else "")
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return Section("What was run", [Facts(shown), *blocks, Code("The complete configuration", text)])


def log_section(run: Path) -> Section:
    """A chart for every loss term (one curve per decoder layer), then learning rate and gradient norm."""
    records = [record for record in JsonLines(run / "log.jsonl").read() if "step" in record]
    if not records:
        return Section("Curves", [Missing("Curves", "log.jsonl is missing or empty")])
    names = list(dict.fromkeys(name for record in records for name in record if name not in AXES))
    groups: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)_(\d+)", name)
        base = match[1] if match and match[1] in names else name
        groups.setdefault(base, []).append(name)
    order = [name for name in NAMES if name in groups] + sorted(groups.keys() - NAMES.keys())
    figures = []
    for base in order:
        layers = sorted((n for n in groups[base] if n != base), key=lambda n: int(n.rpartition("_")[2]))
        curves = [read_curve(records, name, f"layer {i}") for i, name in enumerate(layers, 1)]
        curves.append(read_curve(records, base, f"layer {len(layers) + 1} (last)" if layers else base))
        curves = [curve for curve in curves if curve.x]
        if curves:
            title = NAMES.get(base, base)
            figures.append(line_chart(title, "step", "", curves, EXPLAINED.get(base, "")))
    return Section("Curves", [Grid(figures, 330)])


def read_curve(records: Sequence[Mapping[str, Any]], name: str, label: str) -> Curve:
    """A logged number against the step, averaged over spans if there are many."""
    points = [(float(r["step"]), float(r[name])) for r in records if isinstance(r.get(name), int | float)]
    points = [point for point in points if math.isfinite(point[1])]
    span = max(math.ceil(len(points) / POINTS), 1)
    groups = [points[i : i + span] for i in range(0, len(points), span)]
    x = [group[-1][0] for group in groups]
    y = [sum(value for _, value in group) / len(group) for group in groups]
    return Curve(label, x, y, y, y)
