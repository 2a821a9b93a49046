"""Matplotlib figures as inline SVG in the page's colours, light or dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure as Plot

from siamese_detr.comparison.plots import COLOURS, GRID, INK, STYLE, draw_curves, new_axes, whole_numbers
from siamese_detr.comparison.summary import Curve
from siamese_detr.evaluation.coco import percent
from siamese_detr.reporting.page import Figure

SIZE = (4.8, 3.2)
"""Width and height in inches: text keeps its size on the screen of a phone."""

_numbers = itertools.count()


def inline(plot: Plot, alt: str, caption: str = "") -> Figure:
    """``plot`` as a figure of the page; the style sheet sets its colours of text, grid and series."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"\s?xmlns(:\w+)?=\"[^\"]*\"", "", text).replace("xlink:href", "href")
    # Ids are unique only within a figure: keep those in use, with a prefix of this figure.
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
    """Curves over a common x; the text alternative gives the first and last value of each."""
    plot, axes = new_axes(title, x, y, SIZE)
    draw_curves(axes, [curve for curve in curves if curve.x], [curve.label for curve in curves], bars=False)
    whole_numbers(axes, curves)
    return inline(plot, f"Line chart. {title}. {'; '.join(map(describe, curves))}.", caption)


def plain_curve(label: str, points: Sequence[tuple[float, float]]) -> Curve:
    """A curve through points (x, y), without deviations."""
    x, y = [x for x, _ in points], [y for _, y in points]
    return Curve(label, x, y, y, y)


def describe(curve: Curve) -> str:
    if not curve.x:
        return f"{curve.label}: no values"
    return f"{curve.label}: {curve.mean[0]:.3g} at {curve.x[0]:g}, {curve.mean[-1]:.3g} at {curve.x[-1]:g}"


def bar_chart(title: str, x: str, names: Sequence[str], values: Sequence[float | None], caption: str = "") -> Figure:
    """Horizontal bars in percent, one per name; None is shown as a dash."""
    plot, axes = new_axes(title, x, "", (SIZE[0], 0.9 + 0.27 * len(names)))
    with matplotlib.rc_context(STYLE):
        places = range(len(names))
        axes.barh(places, [100 * (value or 0) for value in values], color=COLOURS[0], height=0.65)
        axes.set_yticks(places, names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, max(100 * max((v or 0 for v in values), default=0) * 1.18, 1))
        axes.grid(axis="y", visible=False)
        for place, value in enumerate(values):
            axes.text(100 * (value or 0), place, f" {percent(value)}", va="center", fontsize=9)
    numbers = ", ".join(f"{name} {percent(value)}" for name, value in zip(names, values, strict=True))
    return inline(plot, f"Bar chart. {title}: {numbers}.", caption)
