"""How views are made; the defaults are the paper's settings for ImageNet (section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from siamese_detr.config import Options
from siamese_detr.errors import UserError

ViewKind = Literal["two", "patches", "proposals"]
"""Two views (Siamese), or one view with random patches (UP-DETR) or the best proposals (DETReg)."""
OF_TWO_VIEWS = ("area_range", "aspect_range", "iou", "shrink", "diagonals", "min_area")


@dataclass(kw_only=True)
class ViewOptions(Options):
    """The views of an image and their regions.

    Args:
        short_sides: possible short sides of the resized image, pixels; one is drawn uniformly.
        max_size: largest long side of the resized image, pixels.
        view_size: None keeps aspect ratios (views are padded to the batch's largest); a number makes every view a
            square of this side.
        flip: mirror the image (all of its views alike) with probability 0.5.
        area_range: smallest and largest area of the outer rectangle, fractions of the image's (two views).
        aspect_range: smallest and largest width / height of the outer rectangle (two views).
        iou: IoU of the two views before they shrink.
        shrink: move the views' outer corners inwards at random.
        diagonals: place the views on either diagonal (the paper: always upper left and lower right).
        min_area: smallest area of a region, fraction of the intersection's (two views).
        selection: top (best scored, the paper) or diverse (without near-duplicates, drawn again each epoch with their
            scores as weights); not of up-detr.
        duplicate_iou: diverse: regions with a larger IoU are near-duplicates.
        box_source: proposals from the store, or random boxes; up-detr's are always random patches.
        box_jitter: how far the edges of padding regions and query boxes move at most, fraction of width and height.
        brightness: strength of the brightness jitter, 0 to 1.
        contrast: strength of the contrast jitter, 0 to 1.
        saturation: strength of the saturation jitter, 0 to 1.
        hue: strength of the hue jitter, turns, 0 to 0.5.
        color_probability: probability of the colour jitter.
        gray_probability: probability of greyscale.
        blur_probability: probability of Gaussian blur.
        blur_sigma: smallest and largest standard deviation of the blur, pixels.
    """

    short_sides: tuple[int, ...] = tuple(range(320, 481, 16))
    max_size: int = 600
    view_size: int | None = None
    flip: bool = True
    area_range: tuple[float, float] = (0.5, 1.0)
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    iou: float = 0.5
    shrink: bool = True
    diagonals: bool = False
    min_area: float = 0.05
    selection: Literal["top", "diverse"] = "top"
    duplicate_iou: float = 0.8
    box_source: Literal["proposals", "random"] = "proposals"
    box_jitter: float = 0.1
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    color_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def check(self) -> None:
        """Raise UserError, naming the setting, if no views can be made with it."""

        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise UserError(f"views: {name}={getattr(self, name)!r}: {remedy}")

        def ordered(pair: tuple[float, float], low: float, high: float) -> bool:
            return len(pair) == 2 and low <= pair[0] <= pair[1] <= high

        require(
            len(self.short_sides) > 0 and min(self.short_sides) >= 1, "short_sides", "give sizes of at least 1 pixel"
        )
        require(self.max_size >= 1, "max_size", "must be at least 1 pixel")
        require(self.view_size is None or self.view_size >= 8, "view_size", "must be at least 8 pixels")
        require(
            ordered(self.area_range, 1e-3, 1),
            "area_range",
            "give the smaller fraction of the image first, then the larger, at most 1",
        )
        require(
            ordered(self.aspect_range, 1e-2, 1e2),
            "aspect_range",
            "give the smaller ratio first, then the larger, between 0.01 and 100",
        )
        require(0 < self.iou <= 1, "iou", "must be above 0, at most 1")
        require(0 < self.min_area < 1, "min_area", "must be a fraction between 0 and 1")
        require(0 < self.duplicate_iou <= 1, "duplicate_iou", "must be above 0, at most 1")
        require(
            0 <= self.box_jitter < 0.5, "box_jitter", "must be at least 0 and below 0.5, so that no box loses its area"
        )
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, name, "must be between 0 and 1")
        require(0 <= self.hue <= 0.5, "hue", "must be between 0 and 0.5")
        for name in ("color_probability", "gray_probability", "blur_probability"):
            require(0 <= getattr(self, name) <= 1, name, "must be a probability, 0 to 1")
        require(
            ordered(self.blur_sigma, 1e-3, 10),
            "blur_sigma",
            "give the smaller sigma first, then the larger, between 0.001 and 10 pixels",
        )

    def unread(self, views: ViewKind) -> Iterator[tuple[tuple[str, ...], str]]:
        """Options that have no effect on views of this kind, and why."""
        if views != "two":
            yield OF_TWO_VIEWS, "there is one view of an image, the whole of it"
        if views == "patches":
            yield ("selection", "duplicate_iou", "box_source"), "the regions are random patches"
        elif self.selection != "diverse":
            yield ("duplicate_iou",), f"selection is {self.selection}"


@dataclass(kw_only=True)
class ViewConfig(ViewOptions):
    """Everything that decides what a sample looks like.

    Args:
        views: what it shows.
        num_regions: regions per view, including the intersection.
    """

    views: ViewKind = "two"
    num_regions: int = 10

    def check(self) -> None:
        if self.num_regions < 1:
            raise UserError(f"num_regions must be at least 1, not {self.num_regions}")

    @property
    def num_views(self) -> int:
        """Views per image."""
        return 2 if self.views == "two" else 1
