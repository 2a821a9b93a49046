"""Detections drawn on pictures: a colour per class, labels that stay legible and apart."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 640  # smaller pictures are enlarged: a label would hide what it names


@cache
def class_colour(index: int) -> tuple[int, int, int]:
    """RGB of a class: hues a golden ratio apart, so that neighbours differ as much as can be."""
    hue = (0.33 + index * 0.61803398875) % 1.0
    lightness = (0.55, 0.45, 0.65)[index // 8 % 3]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.9)
    return round(red * 255), round(green * 255), round(blue * 255)


@cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib ships and which knows most scripts."""
    import matplotlib

    try:
        return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans-Bold.ttf"), size)
    except OSError:
        return ImageFont.load_default(size)


def draw_detections(
    image: np.ndarray, boxes: np.ndarray, classes: np.ndarray, scores: np.ndarray | None, names: Sequence[str]
) -> Image.Image:
    """Draw boxes with their class and score.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) xyxy in pixels of the image.
        classes: (N,) indices into ``names``.
        scores: (N,) in [0, 1], written as percent; None: none are written.
        names: class names.

    Returns:
        the picture, enlarged if its longer side is below 640 pixels.
    """
    picture = Image.fromarray(image)
    factor = max(1, -(-LEAST_SIDE // max(picture.size)))
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC)
    limits = np.array([picture.width - 1, picture.height - 1] * 2)
    boxes = (np.asarray(boxes, np.float64).reshape(-1, 4) * factor).clip(0, limits)
    line = max(2, round(max(picture.size) / 320))
    letters = font(max(12, round(max(picture.size) / 48)))
    draw = ImageDraw.Draw(picture)
    # The highest score last, so that it lies on top.
    order = np.arange(len(boxes)) if scores is None else np.argsort(scores, kind="stable")
    for k in order:
        x1, y1, x2, y2 = boxes[k]
        draw.rectangle((x1, y1, max(x2, x1), max(y2, y1)), outline=class_colour(int(classes[k])), width=line)
    taken: list[tuple[float, float, float, float]] = []
    for k in order[::-1]:
        colour = class_colour(int(classes[k]))
        text = names[int(classes[k])] + ("" if scores is None else f" {100 * scores[k]:.0f}%")
        left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
        size = (right - left + 2 * line, bottom - top + 2 * line)
        place = label_place(boxes[k], size, picture.size, taken)
        taken.append(place)
        draw.rectangle(place, fill=colour)
        ink = (0, 0, 0) if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255)
        draw.text((place[0] + line - left, place[1] + line - top), text, fill=ink, font=letters)
    return picture


def label_place(
    box: np.ndarray,
    size: tuple[float, float],
    picture: tuple[int, int],
    taken: Sequence[tuple[float, float, float, float]],
) -> tuple[float, float, float, float]:
    """Where a label of (width, height) ``size`` goes: above, inside or below its box, where it covers least of the
    others."""
    width, height = size
    x1, y1, x2, y2 = box
    best: tuple[float, float, float, float] = (0, 0, 0, 0)
    least = np.inf
    for x, y in ((x1, y1 - height), (x1, y1), (x2 - width, y1 - height), (x2 - width, y1), (x1, y2), (x1, y2 - height)):
        px = min(max(x, 0), max(picture[0] - 1 - width, 0))
        py = min(max(y, 0), max(picture[1] - 1 - height, 0))
        place = (px, py, px + width, py + height)
        moved = abs(px - x) + abs(py - y)
        covered = sum(
            max(min(place[2], o[2]) - max(place[0], o[0]), 0) * max(min(place[3], o[3]) - max(place[1], o[1]), 0)
            for o in taken
        )
        cost = covered + 0.01 * moved * height
        if cost < least:
            best, least = place, cost
    return best
