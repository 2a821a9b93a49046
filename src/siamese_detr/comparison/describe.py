"""A comparison in words, before it is run: its inputs, the settings that all runs share, and those that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from siamese_detr.comparison.plan import Plan
from siamese_detr.comparison.summary import percent_of

SHOWN = {
    "pretrain": (
        *("detector", "detector_options", "backbone", "num_queries", "num_regions", "short_sides", "max_size"),
        *("view_size", "steps", "epochs", "batch_size", "lr", "weight_decay", "schedule", "drop_at", "clip"),
        *("discrimination", "lambda_region", "lambda_global"),
    ),
    "finetune": (
        *("epochs", "steps", "batch_size", "lr", "backbone_lr", "weight_decay", "schedule", "drop_at", "clip"),
        *("image_size", "max_size", "square"),
    ),
}
"""Settings that are shown even where all runs share them."""
NO_SETTINGS = ("images", "model", "train", "val", "fraction", "seed")
"""Settings that differ, but are shown elsewhere."""


def describe(plan: Plan) -> list[str]:
    """Lines with the inputs, then the settings of pre-training and of fine-tuning."""
    pretraining: dict[str, Mapping[str, Any]] = {}
    for task in plan.tasks:
        if task.verb == "pretrain":
            proposals = task.needs[0].removeprefix("proposals ") if task.needs else task.options["proposals"]
            pretraining[task.name.removeprefix("pre-training ")] = {**task.options, "proposals": proposals}
    finetuning: dict[str, Mapping[str, Any]] = {}
    for task in plan.tasks:
        if task.cell is not None:
            finetuning.setdefault(percent_of(task.cell[1]), task.options)
    lines = [plan.inputs]
    if pretraining:
        lines += ["", *settings("pre-training", pretraining, SHOWN["pretrain"])]
    return [*lines, "", *settings("fine-tuning", finetuning, SHOWN["finetune"])]


def settings(what: str, runs: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    """One line with what all ``runs`` (name -> options) share, and one per run with what it has of its own."""
    first, *others = runs.values()
    common = {name for name in first if all(name in options and options[name] == first[name] for options in others)}
    lines = [f"{what}: {text_of(first, [name for name in shown if name in common])}"]
    for run, options in runs.items():
        if own := text_of(options, [name for name in options if name not in common and name not in NO_SETTINGS]):
            lines.append(f"    {run}: {own}")
    return lines


def text_of(options: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings that matter, as text."""
    unused = {"short_sides", "max_size"} if options.get("view_size") else set()
    values = {name: options[name] for name in names if name not in unused}
    return ", ".join(f"{name} {shortly(value)}" for name, value in values.items() if value not in (None, {}, ""))


def shortly(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
