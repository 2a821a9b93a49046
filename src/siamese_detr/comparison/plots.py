"""Plots of a comparison: AP against labels, AP against epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from siamese_detr.comparison.summary import CellResult, Curve, convergence_curves, label_curves, percent_of
from siamese_detr.files import written_aside

# Okabe and Ito's colours, told apart with any colour vision; markers and dashes tell the curves apart without colour.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fc4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (4, 1)), (0, (1, 1)), (0, (8, 2)))
INK, GRID = "#1b1f24", "#c9ced6"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "svg.fonttype": "none",
}


def new_axes(title: str, x: str, y: str, size: tuple[float, float] = (5.0, 3.4)) -> tuple[Figure, Axes]:
    """A figure with one labelled plot, in our style. Size in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def draw_curves(axes: Axes, curves: Sequence[Curve], order: Sequence[str], bars: bool) -> None:
    """Draw means with their deviations as bars or as bands; a label keeps its colour in every plot of one ``order``."""
    with matplotlib.rc_context(STYLE):
        for curve in curves:
            number = list(order).index(curve.label)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            look = {"color": colour, "linestyle": DASHES[number % len(DASHES)], "label": curve.label}
            few = len(curve.x) <= 12
            axes.plot(curve.x, curve.mean, marker=marker if few else "", **look)  # type: ignore[arg-type]
            if bars:
                away = [
                    [m - low for m, low in zip(curve.mean, curve.low, strict=True)],
                    [high - m for m, high in zip(curve.mean, curve.high, strict=True)],
                ]
                axes.errorbar(curve.x, curve.mean, yerr=away, fmt="none", ecolor=colour, elinewidth=1, capsize=3)
            elif curve.low != curve.high:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.15, linewidth=0)
        low, high = axes.get_ylim()
        axes.set_ylim(max(min(low, *(min(c.mean) for c in curves)), 0) if curves else 0, high)
        if len(curves) > 1:
            legend_below(axes)


def legend_below(axes: Axes) -> None:
    """A legend below the plot, where no curve runs behind it; in two columns if the names are short."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 30 else 1
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def whole_numbers(axes: Axes, curves: Sequence[Curve]) -> None:
    """No fractions on the x axis where all x are whole numbers, such as epochs."""
    if all(value == int(value) for curve in curves for value in curve.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def label_plot(results: Sequence[CellResult]) -> Figure | None:
    """AP against the share of labels (logarithmic); None if no cell is done."""
    curves = label_curves(results)
    if not curves:
        return None
    figure, axes = new_axes("AP against labels", "labels used (%)", "AP (%)")
    axes.set_xscale("log")
    least, most = min(c.x[0] for c in curves), max(c.x[-1] for c in curves)
    axes.set_xlim(least / 1.25, most * 1.25)
    draw_curves(axes, curves, order_of(results), bars=True)
    ticks = sorted({x for curve in curves for x in curve.x})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    return figure


def convergence_plots(results: Sequence[CellResult]) -> dict[float, Figure]:
    """AP against epochs of fine-tuning, one figure per label fraction that has any."""
    figures = {}
    for fraction in sorted({result.fraction for result in results}):
        curves = convergence_curves(results, fraction)
        if curves:
            title = f"Convergence with {percent_of(fraction)} of the labels"
            figure, axes = new_axes(title, "epoch of fine-tuning", "AP (%)")
            draw_curves(axes, curves, order_of(results), bars=False)
            whole_numbers(axes, curves)
            figures[fraction] = figure
    return figures


def order_of(results: Sequence[CellResult]) -> list[str]:
    return list(dict.fromkeys(result.init for result in results))


def save(figure: Figure, path: Path) -> None:
    """Write ``path.svg`` and ``path.png`` (white background)."""
    with matplotlib.rc_context(STYLE):
        for suffix in (".svg", ".png"):
            with written_aside(path.with_name(path.name + suffix)) as aside:
                figure.savefig(aside, dpi=160, facecolor="white")
