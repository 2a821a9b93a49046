"""The verb ``compare``: does pre-training help on my images, and how much, against what I would do otherwise?"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from siamese_detr.comparison.compare_config import CompareConfig
from siamese_detr.comparison.describe import describe
from siamese_detr.comparison.duration import Watch, estimate
from siamese_detr.comparison.luck import Difference, luck_lines
from siamese_detr.comparison.plan import Plan, Task, as_number, with_methods
from siamese_detr.comparison.results import (
    conclude,
    finished,
    read_cells,
    read_differences,
    write_plots,
    write_tables,
)
from siamese_detr.comparison.schedule import Ended, Job, Slot, device_slots, run_jobs
from siamese_detr.comparison.summary import CellResult, to_markdown
from siamese_detr.config import (
    default_of,
    is_required,
    read_sources,
    recipe_comment,
    validate_values,
    verb,
    write_config,
)
from siamese_detr.files import write_text
from siamese_detr.messages import audible, say
from siamese_detr.runtime.lock import Locked, locked
from siamese_detr.runtime.progress import duration
from siamese_detr.runtime.rundir import record_session

DEFAULTS: dict[str, Any] = {"inits": ("backbone", "siamese"), "fractions": (0.01, 0.1, 1.0), "seeds": (0, 1)}
"""What is compared if neither the user nor the recipe says."""
LAST_STEP = 120.0
"""Seconds given to a run of a killed comparison to end its step and save itself."""


@dataclass
class CompareResult:
    """The results of a comparison.

    Args:
        out: its directory: table.md, results.json, plots, and every run.
        cells: one per initialisation, label fraction and seed; metrics are in [0, 1].
        differences: between initialisations, with 95 % intervals.
    """

    out: Path
    cells: list[CellResult]
    differences: list[Difference]

    def __str__(self) -> str:
        return to_markdown(self.cells, luck_lines(self.differences))


@verb(CompareConfig)
def compare(config: CompareConfig) -> CompareResult:
    """Pre-train and fine-tune detectors from several initialisations, with several parts of the labels, and compare.

    If it was killed, the same command continues it. With a changed configuration, only the affected runs are repeated.

    Returns:
        the metrics of every fine-tuned detector.

    Raises:
        UserError: bad input, reported before anything is run.
        Stopped: a signal came; the runs are saved (a SystemExit with code 75).
    """
    config = apply_recipe(config)
    plan = Plan(config)
    missing = unfinished(plan.tasks)
    slots = device_slots(config.parallel)
    seconds = estimate(plan, missing, len(slots))
    todo = f"{len(missing)} of {len(plan.tasks)} runs to do, {len(slots)} at a time"
    todo += f", about {duration(seconds)}" if seconds is not None else ""
    if config.dry_run:
        about = [recipe_comment(CompareConfig, config.recipe), ""] if config.recipe else []
        lines = [*about, *describe(plan), ""]
        lines += [f"{'to run' if task in missing else 'done  '}  {task.name}" for task in plan.tasks]
        say("\n".join([*lines, todo]))
        cells = read_cells(plan)
        return CompareResult(plan.out, cells, read_differences(plan, cells))
    plan.out.mkdir(parents=True, exist_ok=True)
    with locked(plan.out):
        write_config(config, plan.out / "config.yaml")
        record_session(plan.out)
        say(todo)
        result = run_missing(plan, missing, slots)
    Console(stderr=True, quiet=not audible()).print(Markdown(str(result)))
    say(f"table, plots and all runs in {plan.out}; the page of it: siamese-detr report {plan.out}")
    return result


def apply_recipe(config: CompareConfig) -> CompareConfig:
    """Fill in what the recipe says and the user does not, then the defaults.

    Mappings are merged entry by entry. What the recipe says about initialisations and fractions that the user does not
    want is dropped. What the user says about them stays, to be refused.
    """
    recipe = read_sources(CompareConfig, config.recipe, None) if config.recipe else {}
    recipe = validate_values(CompareConfig, recipe, f"recipe {config.recipe}")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(CompareConfig):
        value, own = recipe.get(field.name), getattr(config, field.name)
        if value is None or is_required(field):
            continue
        if isinstance(own, dict):
            changes[field.name] = value | own
        elif own == default_of(field):
            changes[field.name] = value
    for name, value in DEFAULTS.items():
        if getattr(config, name) is None:
            changes.setdefault(name, value)
    filled = dataclasses.replace(config, **changes)
    wanted = with_methods(filled.inits or ()) | config.pretrain_at.keys()
    pretrain_at = {name: options for name, options in filled.pretrain_at.items() if name in wanted}
    # The user's "1" replaces the recipe's "1.0".
    fractions = {*(filled.fractions or ())} - {as_number(name) for name in config.finetune_at}
    finetune_at = {name: at for name, at in recipe.get("finetune_at", {}).items() if as_number(name) in fractions}
    return dataclasses.replace(filled, pretrain_at=pretrain_at, finetune_at=finetune_at | config.finetune_at)


def unfinished(tasks: Sequence[Task]) -> list[Task]:
    """The tasks to run: fine-tunings without a result, and what these need, directly or not."""
    missing: list[Task] = []
    for task in reversed(tasks):  # from fine-tunings to proposals
        if not finished(task) and (task.cell or any(task.name in other.needs for other in missing)):
            missing.insert(0, task)
    return missing


def run_missing(plan: Plan, missing: Sequence[Task], slots: Sequence[Slot]) -> CompareResult:
    """Run what is missing, and write table and plots, also if a run fails or a signal comes."""
    for task in missing:
        if (task.run / ".lock").exists():  # a killed comparison's run may still be saving its last step
            with contextlib.suppress(Locked), locked(task.run, LAST_STEP):
                pass
    tasks = {task.name: task for task in missing}

    def report(job: Job, ended: Ended) -> None:
        task = tasks[job.name]
        conclude(task, ended, plan.out)
        watch.ended(job.name)
        text = duration(ended.seconds) if ended.outcome == "done" else ended.reason
        say(f"{ended.outcome} {task.name}: {text}")
        if task.cell:
            write_tables(plan.out, read_cells(plan))

    try:
        with Watch(missing) as watch:
            run_jobs([job_of(task, tasks) for task in missing], slots, report, watch.look)
    finally:
        cells = read_cells(plan)
        found = read_differences(plan, cells)
        write_tables(plan.out, cells, found)
        write_plots(plan.out, cells)
    return CompareResult(plan.out, cells, found)


def job_of(task: Task, missing: Mapping[str, Task]) -> Job:
    """The command that runs a task, or continues it; all that is needed to repeat it is in its folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    file = task.folder / f"run-{task.key}.yaml"
    options = {**task.options, "out": str(task.run)}
    if task.verb != "propose":
        options["resume"] = (task.run / "config.yaml").exists()
    options |= {name: False for name in ("progress", "pages") if name in options}
    write_text(file, yaml.safe_dump(options, sort_keys=False))
    command = (sys.executable, "-m", "siamese_detr.cli", task.verb, "--config", str(file))
    needs = tuple(name for name in task.needs if name in missing)  # the others are done
    return Job(task.name, command, task.folder / f"run-{task.key}.txt", needs)
