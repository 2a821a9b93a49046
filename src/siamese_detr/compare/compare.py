"""The verb ``compare``: does pre-training help on my images, and how much, against what I would do otherwise?"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from siamese_detr.compare.cells import (
    Protocol,
    Task,
    check_detectors,
    images_key,
    parse_init,
    resolve,
    same_detector,
    same_input,
    split_init,
    tasks,
)
from siamese_detr.compare.compare_config import CompareConfig
from siamese_detr.compare.describe import describe
from siamese_detr.compare.results import METRIC, conclude, finished, read_cell, write_plots, write_tables
from siamese_detr.compare.schedule import Ended, Job, device_slots, run_jobs
from siamese_detr.compare.summary import CellResult, summary_table, to_markdown
from siamese_detr.config import default_of, is_required, read_sources, recipe_comment, verb, write_config
from siamese_detr.errors import UserError
from siamese_detr.evaluation.evaluate import class_map
from siamese_detr.files import write_text
from siamese_detr.images.labels import dataset_key, read_labels
from siamese_detr.images.listing import list_images
from siamese_detr.proposals.propose import ProposeConfig
from siamese_detr.runtime.rundir import record_session
from siamese_detr.runtime.signals import RunLock, wait_unlocked
from siamese_detr.training.finetune_config import FinetuneConfig
from siamese_detr.training.pretrain_config import PretrainConfig

DEFAULTS: dict[str, tuple[Any, ...]] = {
    "inits": ("backbone", "siamese"),
    "fractions": (0.01, 0.1, 1.0),
    "seeds": (0, 1),
}
"""What is compared where neither the user nor a preset says."""
LAST_STEP = 120.0
"""Seconds given to a run of a comparison that was killed, to end its step and save itself."""


@dataclass
class CompareResult:
    """What a comparison found.

    Args:
        out: its directory: table.md, table.csv, results.json, plots, and every run.
        cells: one per initialisation, label fraction and seed.
    """

    out: Path
    cells: list[CellResult]

    def __str__(self) -> str:
        return to_markdown(self.cells, METRIC)


@verb(CompareConfig)
def compare(config: CompareConfig) -> CompareResult:
    """Pre-train and fine-tune detectors from several initialisations, with several parts of the labels, and compare.

    Killed and started again, it goes on; with a changed configuration it runs again only what that touches.

    Raises:
        UserError: bad input, found before anything is run.
        Stopped: SIGTERM came; the runs are saved (a SystemExit with code 75).
    """
    config = apply_preset(config)
    console = Console(stderr=True, soft_wrap=True)
    protocol = make_protocol(config)
    todo = tasks(protocol)
    check_detectors(todo)
    missing = [task for task in todo if not finished(task)]
    missing = [task for task in missing if task.cell or needed(task, missing)]
    if config.dry_run:
        about = [recipe_comment(CompareConfig, config.preset), ""] if config.preset else []
        lines = [*about, *describe(protocol, todo), ""]
        lines += [f"{'to run' if task in missing else 'done  '}  {task.name}" for task in todo]
        console.print("\n".join(lines), markup=False, highlight=False)
        return CompareResult(protocol.out, [read_cell(task, config.evaluation) for task in todo if task.cell])
    protocol.out.mkdir(parents=True, exist_ok=True)
    with RunLock(protocol.out):
        write_config(config, protocol.out / "config.yaml")
        record_session(protocol.out)
        slots = device_slots(config.parallel)
        console.print(f"{len(missing)} of {len(todo)} runs to do, {len(slots)} at a time", highlight=False)
        for task in missing:
            wait_unlocked(task.run, LAST_STEP)
        done_before = [task.name for task in todo if task not in missing]
        jobs = [job_of(task) for task in missing]
        by_name = {task.name: task for task in missing}

        def note(job: Job, ended: Ended) -> None:
            task = by_name[job.name]
            conclude(task, ended, protocol)
            colour = "green" if ended.outcome == "done" else "red"
            text = f"{ended.seconds:.0f} s" if ended.outcome == "done" else ended.reason
            console.print(f"[{colour}]{ended.outcome}[/] {escape(task.name)}: {escape(text)}", highlight=False)
            if task.cell:
                write_tables(protocol.out, [read_cell(t, config.evaluation) for t in todo if t.cell])

        try:
            run_jobs(jobs, slots, note, done_before)
        finally:
            cells = [read_cell(task, config.evaluation) for task in todo if task.cell]
            write_tables(protocol.out, cells)
            write_plots(protocol.out, cells)
    console.print(terminal_table(cells))
    failed = [cell for cell in cells if cell.status != "done"]
    for cell in failed:
        console.print(f"{cell.name}: {cell.status} ({cell.reason})", markup=False, style="red", highlight=False)
    console.print(f"table, plots and all runs in {protocol.out}", markup=False, highlight=False)
    return CompareResult(protocol.out, cells)


def apply_preset(config: CompareConfig) -> CompareConfig:
    """Fill in what the preset says and the user did not, then what neither says; the user's options win.

    What the preset says of initialisations and label fractions that the user does not want is left out. What the user
    says of them stays, to be refused.
    """
    if config.preset is None:
        return fill_in(config)
    changes: dict[str, Any] = {}
    mine, values = config, read_sources(CompareConfig, config.preset, None)
    for spec in dataclasses.fields(CompareConfig):
        own = getattr(mine, spec.name)
        if spec.name not in values or is_required(spec):
            continue
        if isinstance(own, dict):
            changes[spec.name] = values[spec.name] | own
        elif own == default_of(spec):
            given = values[spec.name]
            changes[spec.name] = tuple(given) if isinstance(given, list) else given
    config = fill_in(dataclasses.replace(config, **changes))
    assert config.inits is not None
    assert config.fractions is not None
    wanted = with_methods(config.inits) | mine.variants.keys()
    variants = {name: options for name, options in config.variants.items() if name in wanted}
    told = {as_fraction(part) for part in mine.finetune_at}  # the user's "1" stands for the preset's "1.0"
    parts = set(config.fractions) - told
    at = {part: options for part, options in values.get("finetune_at", {}).items() if as_fraction(part) in parts}
    return dataclasses.replace(config, variants=variants, finetune_at=at | mine.finetune_at)


def fill_in(config: CompareConfig) -> CompareConfig:
    """What the user need not say."""
    missing: dict[str, Any] = {name: value for name, value in DEFAULTS.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def with_methods(inits: Sequence[str]) -> set[str]:
    """The initialisations, and without their options those that have some: names that variants may have."""
    return {*inits, *(split_init(name)[0] for name in inits)}


def make_protocol(config: CompareConfig) -> Protocol:
    """Read all inputs and build all configurations, so that mistakes show before hours of training."""
    assert config.inits is not None
    assert config.fractions is not None
    assert config.seeds is not None
    for name in DEFAULTS:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} must name at least one, each once, not {list(values)}")
    for fraction in config.fractions:
        if not 0 < fraction <= 1:
            raise UserError(f"fractions must be above 0 and at most 1, not {fraction}")
    if config.evaluation not in ("last", "best"):
        raise UserError(f"evaluation must be last or best, not {config.evaluation!r}")
    if config.parallel is not None and config.parallel < 1:
        raise UserError(f"parallel must be at least 1, not {config.parallel}")
    if unused := config.variants.keys() - with_methods(config.inits):
        raise UserError(f"variants has {sorted(unused)[0]!r}, which is not among inits")
    inits = [parse_init(name, config.variants) for name in config.inits]
    images, train, val = (str(Path(p).expanduser().absolute()) for p in (config.images, config.train, config.val))
    # What differs between the cells is filled in for each of them; here it must only be nobody else's to set.
    fixed: dict[str, Any] = {"images": images, "out": "-"}
    propose: ProposeConfig = resolve(ProposeConfig, None, config.propose, fixed)
    fixed |= {"method": "siamese", "init": None}
    pretrain: PretrainConfig = resolve(PretrainConfig, config.pretrain_recipe, config.pretrain, fixed)
    fixed = {"train": train, "val": val, "out": "-", "fraction": 1.0, "seed": 0, "model": None, "init": None}
    finetune: FinetuneConfig = resolve(FinetuneConfig, config.finetune_recipe, config.finetune, fixed)
    if any(not init.stored and init.method is None for init in inits):
        finetune = same_detector(pretrain, finetune, config.finetune)
    training = read_labels(train, finetune.train_images)
    validation = read_labels(val, finetune.val_images, default_split="val")
    class_map(training.class_names, validation.class_names)  # as fine-tuning does: by name, one in common at least
    pretrains = any(init.method for init in inits)
    unlabelled = list_images(images) if pretrains else None
    read = f"labels: {len(training)} images with {len(training.class_names)} classes in {config.train}; measured on "
    read += f"{len(validation)} images of {config.val}, on the {config.evaluation} evaluation"
    if unlabelled is not None:
        read = f"images to pre-train on: {len(unlabelled)} in {config.images}\n{read}"
    return Protocol(
        out=Path(config.out).expanduser().absolute(),
        images=images,
        images_key=images_key(unlabelled) if unlabelled is not None else "",
        labels_key=dataset_key(training, validation),
        propose=propose,
        pretrain=pretrain,
        finetune=same_input(pretrain, finetune),
        inits=inits,
        fractions=config.fractions,
        seeds=config.seeds,
        by_fraction=read_fractions(config.finetune_at, config.fractions),
        counts={(f, s): len(training.take(f, s)) for f in config.fractions for s in config.seeds},
        pretrain_each_seed=config.pretrain_each_seed,
        inputs=read,
    )


def read_fractions(
    options: Mapping[str, Mapping[str, Any]], fractions: Sequence[float]
) -> dict[float, Mapping[str, Any]]:
    """Options by fraction, with the fractions as numbers."""
    found = {}
    for name, values in options.items():
        fraction = as_fraction(name)
        if fraction not in fractions:
            raise UserError(f"finetune_at has {name!r}, which is none of the fractions {list(fractions)}")
        found[fraction] = values
    return found


def as_fraction(name: str) -> float:
    """The number that ``name`` is; -1 if it is none."""
    try:
        return float(name)
    except ValueError:
        return -1.0


def needed(task: Task, missing: Sequence[Task]) -> bool:
    """Whether a task that is still to run needs this one, directly or not."""
    return any(task.name in other.needs and (other.cell or needed(other, missing)) for other in missing)


def job_of(task: Task) -> Job:
    """The command that runs a task, or continues it; everything needed to repeat it stands in its folder."""
    task.folder.mkdir(parents=True, exist_ok=True)
    file = task.folder / f"run-{task.key}.yaml"
    resume = {"resume": (task.run / "config.yaml").exists()} if task.verb != "propose" else {}
    options = {**task.options, "out": str(task.run), **resume}
    if "progress" in options:
        options["progress"] = False
    write_text(file, yaml.safe_dump(options, sort_keys=False))
    command = (sys.executable, "-m", "siamese_detr.cli", task.verb, "--config", str(file))
    return Job(task.name, command, task.folder / f"run-{task.key}.txt", task.needs)


def terminal_table(cells: Sequence[CellResult]) -> Table:
    text = summary_table(cells, METRIC)
    table = Table(caption=f"{METRIC} in percent, mean ± standard deviation over seeds, by share of the labels")
    table.add_column("initialisation")
    for header in text.headers:
        table.add_column(header, justify="right")
    for number, (init, row) in enumerate(zip(text.inits, text.rows, strict=True)):
        marked = (f"[bold]{v}[/]" if best == number else v for v, best in zip(row, text.best, strict=True))
        table.add_row(escape(init), *marked)
    return table
