"""Images with boxes drawn on them, as SVG; a page stores each image once, however often it shows it."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from siamese_detr.reporting.page import Figure

# Bright on any image (each line has a dark rim). Tags carry numbers, so that colour is not the only sign.
COLOURS = (
    "#ffd92f", "#4cc9f0", "#ff6b6b", "#7ae582", "#f78bd8", "#ff9f1c", "#b79cff", "#e8f04a", "#66e0d0", "#ffffff",
)  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A rectangle on an image.

    Args:
        xyxy: corners in pixels of the image as it was added.
        colour: of the line.
        tag: text at its corner; none if empty.
        dashed: draw the line dashed.
    """

    xyxy: Sequence[float]
    colour: str
    tag: str = ""
    dashed: bool = False


@dataclass
class Album:
    """The images of a page.

    Args:
        longest: longest side in pixels; larger images are reduced to it.
    """

    longest: int = 420
    photos: list[Markup] = field(default_factory=list)

    def add(self, pixels: np.ndarray, size: tuple[int, int] | None = None) -> Photo:
        """Store an image.

        Args:
            pixels: (H, W, 3) uint8.
            size: (width, height) that boxes refer to, if the image was decoded smaller.
        """
        width, height = size or (pixels.shape[1], pixels.shape[0])
        image = Image.fromarray(np.ascontiguousarray(pixels))
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=82)
        data = base64.b64encode(buffer.getvalue()).decode()
        name = f"photo{len(self.photos)}"
        self.photos.append(
            Markup(
                f'<image id="{name}" width="{width}" height="{height}" preserveAspectRatio="none" '
                f'href="data:image/jpeg;base64,{data}"/>'
            )
        )
        return Photo(name, width, height)

    def markup(self) -> Markup:
        """For :attr:`Page.photos`."""
        return Markup().join(self.photos)


@dataclass(frozen=True)
class Photo:
    """An image in the album: its id, and its original width and height in pixels."""

    name: str
    width: int
    height: int

    def draw(self, boxes: Sequence[Box], alt: str, caption: str = "") -> Figure:
        """The image with ``boxes`` drawn on it, the first on top."""
        side = max(self.width, self.height)
        text, line = side * 0.045, side * 0.0055
        parts = [f'<use href="#{self.name}"/>']
        for box in reversed(boxes):
            x1, y1, x2, y2 = (float(value) for value in box.xyxy)
            # Boxes may reach beyond the image: keep their lines visible at its border.
            x1, x2 = (min(max(x, line), self.width - line) for x in (x1, x2))
            y1, y2 = (min(max(y, line), self.height - line) for y in (y1, y2))
            width, height = max(x2 - x1, 0), max(y2 - y1, 0)
            shape = f'x="{x1:.1f}" y="{y1:.1f}" width="{width:.1f}" height="{height:.1f}" fill="none"'
            dash = f' stroke-dasharray="{4 * line:.1f} {2.5 * line:.1f}"' if box.dashed else ""
            parts.append(f'<rect {shape} stroke="#000" stroke-opacity=".55" stroke-width="{2.1 * line:.2f}"{dash}/>')
            parts.append(f'<rect {shape} stroke="{box.colour}" stroke-width="{line:.2f}"{dash}/>')
        taken: list[tuple[float, float]] = []
        tags = []
        for box in boxes:
            if not box.tag:
                continue
            # Tags stay inside the image and do not cover each other.
            wide = text * (0.62 * len(box.tag) + 0.5)
            x = min(max(float(box.xyxy[0]), 0), max(self.width - wide, 0))
            y = min(max(float(box.xyxy[1]), 0), self.height - 1.25 * text)
            while x + wide < self.width and any(abs(x - u) < wide and abs(y - v) < 1.2 * text for u, v in taken):
                x += 0.25 * text
            taken.append((x, y))
            tags.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{1.25 * text:.1f}" fill="{box.colour}"/>'
                f'<text x="{x + 0.25 * text:.1f}" y="{y + 0.97 * text:.1f}" font-size="{text:.1f}" fill="#111">'
                f"{escape(box.tag)}</text>"
            )
        parts += reversed(tags)
        opening = f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(alt)}">'
        return Figure(Markup(opening + "".join(parts) + "</svg>"), caption)
