"""The results of a comparison on disk: written as runs end, read back by key, summarised in tables and plots."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.comparison import plots
from siamese_detr.comparison.luck import Cell, Difference, differences, luck_lines
from siamese_detr.comparison.plan import Plan, Task
from siamese_detr.comparison.schedule import Ended
from siamese_detr.comparison.summary import CellResult, to_json, to_markdown
from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import Detections
from siamese_detr.evaluation.resampling import resampled_ap
from siamese_detr.files import write_json, write_text, written_aside
from siamese_detr.runtime.journal import JsonLines

RESULT = "result.json"


def finished(task: Task) -> bool:
    """Whether there is a result under the task's key."""
    return read_json(task.run / RESULT).get("status") == "done"


def conclude(task: Task, ended: Ended, out: Path) -> None:
    """Write a task's result: into its run if it is done, and for a cell always beside it.

    Raises:
        UserError: the run succeeded, but has no metrics.
    """
    record: dict[str, Any] = {
        "key": task.key,
        "status": ended.outcome,
        "reason": ended.reason,
        "seconds": round(ended.seconds, 1),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": str(task.run.relative_to(out)),
        "verb": task.verb,
        "configuration": dict(task.options),
    }
    if task.cell:
        record |= dict(zip(("init", "fraction", "seed"), task.cell, strict=True))
        record["images"] = task.images
    if ended.outcome == "done":
        if task.cell:
            record |= harvest(task.run)
        write_json(task.run / RESULT, record)
    if task.cell:
        if ended.outcome == "done":  # they only serve to continue
            shutil.rmtree(task.run / "checkpoints", ignore_errors=True)
        write_json(task.folder / RESULT, record)


def harvest(run: Path) -> dict[str, Any]:
    """What a fine-tuning measured: best and last metrics, and the history of evaluations."""
    metrics = read_json(run / "metrics.json")
    if not metrics:
        raise UserError(f"{run} has no metrics.json; was it removed?")
    history = JsonLines(run / "history.jsonl").read()
    return {
        "best": numbers(metrics["best"]),
        "last": numbers(metrics["last"]),
        "history": [{"epoch": record["epoch"], "step": record["step"]} | numbers(record) for record in history],
    }


def numbers(record: Mapping[str, Any]) -> dict[str, float | None]:
    """COCO's overall numbers of an evaluation's record."""
    return {k: v for k, v in record.items() if k.startswith(("AP", "AR")) and (v is None or isinstance(v, int | float))}


def read_cells(plan: Plan) -> list[CellResult]:
    """The result of every fine-tuning."""
    before: dict[str, float] = {}  # task -> seconds until it can start
    cells = []
    for task in plan.tasks:  # those that others need come first
        before[task.name] = sum(before[name] + seconds(plan.named[name]) for name in task.needs)
        if task.cell:
            cells.append(read_cell(task, task.cell, plan.config.evaluation, before[task.name]))
    return cells


def seconds(task: Task) -> float:
    """Wall time of a finished task; 0 if it is not."""
    return read_json(task.run / RESULT).get("seconds", 0.0)


def read_cell(task: Task, cell: Cell, evaluation: str, before: float) -> CellResult:
    """The result of a cell under its present key, or that it is missing."""
    record = read_json(task.run / RESULT) or read_json(task.folder / RESULT)
    if record.get("key") != task.key:
        return CellResult(*cell, key=task.key)
    return CellResult(
        *cell,
        key=task.key,
        status=record["status"],
        reason=record["reason"],
        metrics=record.get(evaluation, {}),
        history=record.get("history", []),
        images=record.get("images"),
        seconds=record["seconds"],
        pretraining_seconds=before,
        run=record["run"],
    )


def read_differences(plan: Plan, cells: Sequence[CellResult]) -> list[Difference]:
    """The differences between initialisations, as far as their detections are known."""
    found = {task.cell: resampled(task, plan) for task in plan.tasks if task.cell and finished(task)}
    return differences(cells, {cell: aps for cell, aps in found.items() if aps is not None})


def resampled(task: Task, plan: Plan) -> np.ndarray | None:
    """APs of a finished cell on resampled validation images, computed once; None without its detections."""
    evaluation = plan.config.evaluation
    file, detections = task.run / f"resampled-{evaluation}.npy", task.run / f"detections-{evaluation}.npz"
    with contextlib.suppress(OSError, ValueError):
        return np.load(file, allow_pickle=False)
    try:
        _, aps = resampled_ap(plan.validation, Detections.read(detections))
    except (OSError, ValueError):
        return None
    with written_aside(file) as aside:
        np.save(aside, aps)
    return aps


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none, or none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_tables(out: Path, cells: Sequence[CellResult], found: Sequence[Difference] = ()) -> None:
    """Write table.md and results.json of what is done so far."""
    write_text(out / "table.md", to_markdown(cells, luck_lines(found)))
    write_json(out / "results.json", to_json(cells) | {"differences": list(map(dataclasses.asdict, found))})


def write_plots(out: Path, cells: Sequence[CellResult]) -> None:
    """Write the plots of what is done so far, each as SVG and PNG."""
    if (figure := plots.label_plot(cells)) is not None:
        plots.save(figure, out / "ap-against-labels")
    for fraction, figure in plots.convergence_plots(cells).items():
        plots.save(figure, out / f"convergence-{fraction:g}")
