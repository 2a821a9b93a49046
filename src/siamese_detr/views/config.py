"""How views are made: one flat dataclass; its defaults are the paper's settings for ImageNet (section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from siamese_detr.errors import UserError


@dataclass(frozen=True)
class ViewConfig:
    """Everything that decides what a sample looks like.

    Args:
        views: "two" (Siamese), "patches" (UP-DETR: one view, random patches) or "proposals" (DETReg: one view, the best
            proposals).
        short_sides: possible short sides of the resized image, pixels; one is drawn uniformly.
        max_size: largest long side of the resized image, pixels.
        view_size: None keeps aspect ratios (views are padded to the batch's largest); a number makes every view a
            square of this side.
        flip: mirror the image (all of its views alike) with probability 0.5.
        area_range: smallest and largest area of the outer rectangle, fractions of the image's.
        aspect_range: smallest and largest width / height of the outer rectangle.
        iou: IoU of the two views before they shrink.
        shrink: move the views' outer corners inwards at random.
        diagonals: place the views on either diagonal (the paper: always upper left and lower right).
        num_regions: regions per view, including the intersection.
        min_area: smallest area of a region, fraction of the intersection's.
        selection: "top" (best scored, the paper) or "diverse" (without near-duplicates, drawn again each epoch with
            their scores as weights).
        duplicate_iou: for "diverse": regions with a larger IoU are near-duplicates.
        box_source: "proposals" from the store, or "random" boxes.
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

    views: Literal["two", "patches", "proposals"] = "two"
    short_sides: tuple[int, ...] = tuple(range(320, 481, 16))
    max_size: int = 600
    view_size: int | None = None
    flip: bool = True
    area_range: tuple[float, float] = (0.5, 1.0)
    aspect_range: tuple[float, float] = (3 / 4, 4 / 3)
    iou: float = 0.5
    shrink: bool = True
    diagonals: bool = False
    num_regions: int = 10
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

    def __post_init__(self) -> None:
        """Raise UserError, naming the setting, if no views can be made with it."""

        def require(condition: bool, name: str, remedy: str) -> None:
            if not condition:
                raise UserError(f"views: {name}={getattr(self, name)!r}: {remedy}")

        def ordered(pair: tuple[float, float], low: float, high: float) -> bool:
            return len(pair) == 2 and low <= pair[0] <= pair[1] <= high

        require(self.views in ("two", "patches", "proposals"), "views", "use two, patches or proposals")
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
        require(self.num_regions >= 1, "num_regions", "must be at least 1")
        require(0 < self.min_area < 1, "min_area", "must be a fraction between 0 and 1")
        require(self.selection in ("top", "diverse"), "selection", "use top or diverse")
        require(0 < self.duplicate_iou <= 1, "duplicate_iou", "must be above 0, at most 1")
        require(self.box_source in ("proposals", "random"), "box_source", "use proposals or random")
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

    @property
    def num_views(self) -> int:
        """Views per image."""
        return 2 if self.views == "two" else 1
