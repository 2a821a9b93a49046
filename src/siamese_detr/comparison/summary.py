"""The cells of a comparison gathered: mean and standard deviation over seeds, as Markdown and JSON."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class CellResult:
    """One fine-tuning of a comparison.

    Args:
        init: the initialisation, as the user named it.
        fraction: of the training images, in (0, 1].
        seed: of the choice of images, new weights and training.
        key: hash of everything that determines the result.
        status: done; failed; skipped because its pre-training failed; missing: not run yet.
        reason: why, in one line, where it is not done.
        metrics: COCO's numbers in [0, 1] by name (``AP``, ``AP50``, ...); None where undefined.
        history: per evaluation during training: ``epoch`` and the metrics.
        images: number of labelled training images used; None if unknown.
        seconds: wall time of the fine-tuning.
        run: the run directory, relative to the comparison's.
        pretraining_seconds: wall time of what was needed before it: proposals and pre-training.
    """

    init: str
    fraction: float
    seed: int
    key: str = ""
    status: Literal["done", "failed", "skipped", "missing"] = "missing"
    reason: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    images: int | None = None
    seconds: float = 0.0
    run: str = ""
    pretraining_seconds: float = 0.0

    @property
    def name(self) -> str:
        """For people: ``siamese, 10 %, seed 1``."""
        return f"{self.init}, {percent_of(self.fraction)}, seed {self.seed}"


@dataclass(frozen=True)
class Entry:
    """An entry of the table: one initialisation at one label fraction.

    Args:
        init, fraction: which.
        mean: over the seeds that are done; None if there is none.
        ap50: mean AP50 over the same seeds.
        std: sample standard deviation; None with fewer than two seeds.
        count: seeds done.
        expected: seeds asked for.
        images: labelled images, mean over seeds; None if unknown.
    """

    init: str
    fraction: float
    mean: float | None
    ap50: float | None
    std: float | None
    count: int
    expected: int
    images: float | None


def percent_of(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def entries(results: Sequence[CellResult]) -> list[Entry]:
    """One entry per initialisation and fraction, in the order in which they first appear."""
    groups: dict[tuple[str, float], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.init, result.fraction), []).append(result)
    made = []
    for (init, fraction), group in groups.items():
        done = [r for r in group if r.status == "done" and r.metrics.get("AP") is not None]
        values = [v for r in done if (v := r.metrics["AP"]) is not None]
        loose = [v for r in done if (v := r.metrics.get("AP50")) is not None]
        mean, std = statistics.fmean(values) if values else None, statistics.stdev(values) if values[1:] else None
        counts = [r.images for r in group if r.images is not None]
        images = statistics.fmean(counts) if counts else None
        ap50 = statistics.fmean(loose) if loose else None
        made.append(Entry(init, fraction, mean, ap50, std, len(values), len(group), images))
    return made


@dataclass(frozen=True)
class SummaryTable:
    """The table as text: ``rows[i][j]`` belongs to ``inits[i]`` and ``headers[j]``; ``best[j]`` is the best row of a
    column, None if there are fewer than two."""

    headers: list[str]
    inits: list[str]
    rows: list[list[str]]
    best: list[int | None]


def summary_table(results: Sequence[CellResult]) -> SummaryTable:
    """Initialisations down, label fractions across, in percent: ``12.3 ± 0.4 (AP50 30.1)``, with a note if seeds are
    missing; then the minutes that pre-training took, and on average a fine-tuning."""
    by_place = {(entry.init, entry.fraction): entry for entry in entries(results)}
    inits = list(dict.fromkeys(init for init, _ in by_place))
    fractions = sorted({fraction for _, fraction in by_place})
    headers: list[str] = []
    best: list[int | None] = []
    for fraction in fractions:
        column = [by_place.get((init, fraction)) for init in inits]
        counts = [entry.images for entry in column if entry is not None and entry.images is not None]
        headers.append(percent_of(fraction) + (f" ({round(statistics.fmean(counts))} images)" if counts else ""))
        means = [(entry.mean, i) for i, entry in enumerate(column) if entry is not None and entry.mean is not None]
        best.append(max(means)[1] if len(means) > 1 else None)
    rows = [[format_entry(by_place.get((init, fraction))) for fraction in fractions] for init in inits]
    for row, init in zip(rows, inits, strict=True):
        mine = [result for result in results if result.init == init and result.status == "done"]
        for seconds in ([r.pretraining_seconds for r in mine], [r.seconds for r in mine]):
            row.append(f"{statistics.fmean(seconds) / 60:.1f}" if mine else "–")
    return SummaryTable([*headers, "pre-training (min)", "fine-tuning (min)"], inits, rows, [*best, None, None])


def format_entry(entry: Entry | None) -> str:
    if entry is None or entry.mean is None:
        return "–"
    text = f"{100 * entry.mean:.1f}" + (f" ± {100 * entry.std:.1f}" if entry.std is not None else "")
    notes = [f"{100 * entry.ap50:.1f}"] if entry.ap50 is not None else []
    if entry.count < entry.expected:
        notes.append(f"{entry.count} of {entry.expected} seeds")
    return f"{text} ({', '.join(notes)})" if notes else text


def to_markdown(results: Sequence[CellResult], answers: Sequence[str] = ()) -> str:
    """The table, the best mean of each column in bold, a line for every cell that is not done, and ``answers``."""
    table = summary_table(results)
    lines = [
        "AP in percent, mean ± standard deviation over seeds (AP50); columns: share of the training labels.",
        "",
        "| initialisation | " + " | ".join(table.headers) + " |",
        "|---|" + "---:|" * len(table.headers),
    ]
    for number, (init, row) in enumerate(zip(table.inits, table.rows, strict=True)):
        cells = [f"**{text}**" if best == number else text for text, best in zip(row, table.best, strict=True)]
        lines.append(f"| {escape(init)} | " + " | ".join(cells) + " |")
    problems = [r for r in results if r.status != "done"]
    if problems:
        lines += ["", "Not done:", ""]
        lines += [f"- {escape(r.name)}: {r.status}" + (f" ({escape(r.reason)})" if r.reason else "") for r in problems]
    if answers:
        lines += ["", *(f"- {escape(answer)}" for answer in answers)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("`", "'")


def to_json(results: Sequence[CellResult]) -> dict[str, Any]:
    """``entries`` and every cell's result."""
    return {
        "entries": [dataclasses.asdict(entry) for entry in entries(results)],
        "cells": [dataclasses.asdict(result) for result in results],
    }


@dataclass(frozen=True)
class Curve:
    """A mean over seeds against x; ``low`` and ``high`` are one standard deviation away (equal to the mean for one
    seed)."""

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def label_curves(results: Sequence[CellResult]) -> list[Curve]:
    """AP in percent against the percentage of labels, one curve per initialisation."""
    points: dict[str, list[tuple[float, float, float]]] = {}
    for entry in sorted(entries(results), key=lambda entry: entry.fraction):
        if entry.mean is not None:
            points.setdefault(entry.init, []).append((100 * entry.fraction, entry.mean, entry.std or 0.0))
    return curves(results, points)


def convergence_curves(results: Sequence[CellResult], fraction: float) -> list[Curve]:
    """AP in percent on the validation images against epochs of fine-tuning, at one label fraction.

    The first evaluations of all seeds are averaged, then the second, and so on: the parts of the labels differ by some
    images between seeds, so that the epochs of their evaluations are not quite equal.
    """
    at: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for result in results:
        if result.fraction == fraction and result.status == "done":
            for number, record in enumerate(result.history):
                if record.get("AP") is not None and "epoch" in record:
                    pair = (float(record["epoch"]), record["AP"])
                    at.setdefault(result.init, {}).setdefault(number, []).append(pair)
    points: dict[str, list[tuple[float, float, float]]] = {}
    for init, evaluations in at.items():
        for _, pairs in sorted(evaluations.items()):
            epochs, values = zip(*pairs, strict=True)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            points.setdefault(init, []).append((statistics.fmean(epochs), statistics.fmean(values), deviation))
    return curves(results, points)


def curves(results: Sequence[CellResult], points: Mapping[str, list[tuple[float, float, float]]]) -> list[Curve]:
    """Curves in percent of (x, mean, std) by initialisation, mean and std as fractions of 1, in the order of results.

    Points that are not finite are left out.
    """
    made = []
    for init in dict.fromkeys(result.init for result in results):
        if kept := [(x, 100 * mean, 100 * std) for x, mean, std in points.get(init, []) if math.isfinite(mean)]:
            x, mean, std = (list(column) for column in zip(*kept, strict=True))
            low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
            made.append(Curve(init, x, mean, low, high))
    return made
