"""The parts of a page, and how they become one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import ClassVar

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Missing:
    """A part that is left out, and why."""

    kind: ClassVar[str] = "missing"
    what: str
    why: str


@dataclass(frozen=True)
class Facts:
    """Names and values, side by side."""

    kind: ClassVar[str] = "facts"
    facts: dict[str, str]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row, the others are aligned right unless long.

    Args:
        caption: above it.
        headers: of all columns.
        rows: one list of texts per row.
        strong: (row, column) of entries in bold.
        shade: (row, column) -> strength in [0, 1] of the entry's background colour.
        long: columns of long texts, which may break anywhere.
    """

    kind: ClassVar[str] = "table"
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    shade: dict[tuple[int, int], float] = field(default_factory=dict)
    long: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Figure:
    """A drawing, as inline SVG with its own text alternative, and the caption below it."""

    svg: Markup
    caption: str = ""


@dataclass(frozen=True)
class Grid:
    """Figures side by side, as many as fit; ``width`` is the smallest of one in CSS pixels, but for narrow screens."""

    kind: ClassVar[str] = "grid"
    figures: Sequence[Figure]
    width: int = 320


@dataclass(frozen=True)
class Heading:
    """A heading below the section's."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Code:
    """Preformatted text, folded behind ``summary``."""

    kind: ClassVar[str] = "code"
    summary: str
    text: str


Block = Text | Missing | Facts | Table | Grid | Heading | Code


@dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A page; ``photos`` are the SVG elements that its figures refer to by id."""

    title: str
    summary: str
    sections: Sequence[Section]
    photos: Markup | str = ""


def render(page: Page) -> str:
    """The page as one HTML document."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    files = resources.files("siamese_detr.reporting")
    style = Markup(files.joinpath("page.css").read_text(encoding="utf-8"))
    template = environment.from_string(files.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(page=page, style=style)
