"""Matplotlib figures as inline SVG that takes the page's colours, light or dark, and loads nothing."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure as Plot

from siamese_detr.compare.plots import COLOURS, DASHES, GRID, INK, STYLE, legend_below, new_axes, whole_numbers
from siamese_detr.compare.summary import Curve
from siamese_detr.reporting.page import Figure

SIZE = (4.8, 3.2)
"""Inches; at a phone's width the text is then still as large as matplotlib means it."""

_numbers = itertools.count()


def inline(plot: Plot, alt: str, caption: str = "") -> Figure:
    """``plot`` as a figure of the page; its colours of text, grid and series become the style sheet's."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s?xmlns(:\w+)?=\"[^\"]*\"", "", text).replace("xlink:href", "href")
    # Ids are unique within a figure only: keep those referred to, under a name of this figure's own.
    prefix = f"c{next(_numbers)}-"
    used = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{prefix}{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}", text)
    for name, colour in [("ink", INK), ("line", GRID), *((f"s{i}", c) for i, c in enumerate(COLOURS))]:
        text = text.replace(colour, f"var(--{name})")
    opening = re.sub(r' (width|height)="[^"]*"', "", text[: text.index(">")])
    opening += f' class="chart" role="img" aria-label="{escape(alt)}"'
    return Figure(Markup(opening + text[text.index(">") :]), caption)


def line_chart(title: str, x: str, y: str, curves: Sequence[Curve], caption: str = "") -> Figure:
    """Curves over a common x ; the text alternative tells each one's first and last value."""
    plot, axes = new_axes(title, x, y, SIZE)
    with matplotlib.rc_context(STYLE):
        for number, curve in enumerate(curves):
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
            dot = "o" if len(curve.x) == 1 else ""
            axes.plot(curve.x, curve.mean, color=colour, linestyle=dash, marker=dot, label=curve.label)
        whole_numbers(axes, curves)
        if len(curves) > 1:
            legend_below(axes)
    return inline(plot, f"Line chart. {title}. {'; '.join(map(describe, curves))}.", caption)


def describe(curve: Curve) -> str:
    if not curve.x:
        return f"{curve.label}: nothing"
    return f"{curve.label}: {curve.mean[0]:.3g} at {curve.x[0]:g}, {curve.mean[-1]:.3g} at {curve.x[-1]:g}"


def bar_chart(title: str, x: str, names: Sequence[str], values: Sequence[float | None], caption: str = "") -> Figure:
    """Horizontal bars in percent, one per name; None: no bar, and a dash."""
    plot, axes = new_axes(title, x, "", (SIZE[0], 0.9 + 0.27 * len(names)))
    with matplotlib.rc_context(STYLE):
        places = range(len(names))
        axes.barh(places, [100 * (value or 0) for value in values], color=COLOURS[0], height=0.65)
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, max(100 * max((v or 0 for v in values), default=0) * 1.18, 1))
        axes.grid(axis="y", visible=False)
        for place, value in enumerate(values):
            text = "–" if value is None else f"{100 * value:.1f}"
            axes.text(100 * (value or 0), place, f" {text}", va="center", fontsize=9)
    texts = ["undefined" if value is None else f"{100 * value:.1f}" for value in values]
    told = ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=True))
    return inline(plot, f"Bar chart. {title}: {told}.", caption)
