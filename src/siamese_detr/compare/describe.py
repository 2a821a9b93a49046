"""A comparison in words, before it is run: what it reads, what all runs have in common, and what tells them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from siamese_detr.compare.cells import Protocol, Task
from siamese_detr.compare.summary import percent_of

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
"""Settings that make a protocol, shown although no run differs from another in them."""
NO_SETTINGS = ("images", "proposals", "model", "train", "val", "fraction", "seed")
"""What differs, but is told elsewhere."""


def describe(protocol: Protocol, tasks: Sequence[Task]) -> list[str]:
    """Lines that tell the inputs, then the settings of pre-training and of fine-tuning."""
    pretraining = {task.name.removeprefix("pre-training "): task.options for task in tasks if task.verb == "pretrain"}
    finetuning: dict[str, Mapping[str, Any]] = {}
    for task in tasks:
        if task.cell is not None:
            finetuning.setdefault(percent_of(task.cell[1]), task.options)
    lines = [protocol.inputs]
    if pretraining:
        lines += ["", *settings("pre-training", pretraining, SHOWN["pretrain"])]
    return [*lines, "", *settings("fine-tuning", finetuning, SHOWN["finetune"])]


def settings(what: str, runs: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    """One line of what all ``runs`` (name -> options) have in common, and one for each of what it has of its own."""
    first, *others = runs.values()
    common = {name for name in first if all(name in options and options[name] == first[name] for options in others)}
    lines = [f"{what}: {told(first, [name for name in shown if name in common])}"]
    for run, options in runs.items():
        if own := told(options, [name for name in options if name not in common and name not in NO_SETTINGS]):
            lines.append(f"    {run}: {own}")
    return lines


def told(options: Mapping[str, Any], names: Sequence[str]) -> str:
    """The settings that say something."""
    overruled = {"epochs"} if options.get("steps") else set()
    overruled |= {"short_sides", "max_size"} if options.get("view_size") else set()
    overruled |= set() if options.get("schedule") == "step" else {"drop_at"}
    values = {name: options[name] for name in names if name not in overruled}
    return ", ".join(f"{name} {shortly(value)}" for name, value in values.items() if value not in (None, {}, ""))


def shortly(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
