"""How views are cut: one flat dataclass, with the paper's settings as values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from siamese_detr.errors import UserError


@dataclass(frozen=True)
class ViewConfig:
    """Everything that decides what a sample looks like.

    Args:
        views: "two" (Siamese), "patches" (UP-DETR: one view, random patches) or "proposals" (DETReg: one view, the best
            proposals).
        short_sides: short side of the resized image, drawn uniformly.
        max_size: its long side at most.
        view_size: None keeps aspect ratios (views are padded to the batch's largest); a number makes every view a
            square of this side.
        flip: mirror the image (all of its views alike) with probability 0.5.
        area_range: area of the outer rectangle, share of the image.
        aspect_range: its width / height.
        iou: IoU of the two maximal views.
        shrink: move the views' outer corners inwards at random.
        diagonals: use both diagonals (the paper: always upper left and lower right).
        num_regions: regions per view, the intersection included.
        min_area: smallest region, share of the intersection.
        selection: "top" (best scored, the paper) or "diverse" (no near-duplicates, drawn anew each epoch by score).
        duplicate_iou: "diverse": regions that overlap more than this are near-duplicates.
        box_source: "proposals" of the store or "random" boxes.
        box_jitter: how far the edges of padding and of query boxes move, share of width and height.
        brightness: strength of the colour jitter.
        contrast: strength of the colour jitter.
        saturation: strength of the colour jitter.
        hue: strength of the colour jitter, turns.
        color_probability: probability of the colour jitter.
        gray_probability: probability of greyscale.
        blur_probability: probability of Gaussian blur.
        blur_sigma: its standard deviation, pixels.
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
        """Raise UserError, naming the setting, for values that make no views."""

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
        require(ordered(self.area_range, 1e-3, 1), "area_range", "must be ordered shares of the image, at most 1")
        require(ordered(self.aspect_range, 1e-2, 1e2), "aspect_range", "must be ordered ratios, between 0.01 and 100")
        require(0 < self.iou <= 1, "iou", "must be above 0, at most 1")
        require(self.num_regions >= 1, "num_regions", "must be at least 1")
        require(0 < self.min_area < 1, "min_area", "must be a share between 0 and 1")
        require(self.selection in ("top", "diverse"), "selection", "use top or diverse")
        require(0 < self.duplicate_iou <= 1, "duplicate_iou", "must be above 0, at most 1")
        require(self.box_source in ("proposals", "random"), "box_source", "use proposals or random")
        require(0 <= self.box_jitter < 0.5, "box_jitter", "must be below 0.5, so that no box vanishes")
        for name in ("brightness", "contrast", "saturation"):
            require(0 <= getattr(self, name) <= 1, name, "must be between 0 and 1")
        require(0 <= self.hue <= 0.5, "hue", "must be between 0 and 0.5")
        for name in ("color_probability", "gray_probability", "blur_probability"):
            require(0 <= getattr(self, name) <= 1, name, "is a probability")
        require(ordered(self.blur_sigma, 1e-3, 10), "blur_sigma", "must be ordered, between 0.001 and 10 pixels")

    @property
    def num_views(self) -> int:
        """Views per image."""
        return 2 if self.views == "two" else 1

    @classmethod
    def imagenet(cls) -> ViewConfig:
        """The paper's settings for pre-training on ImageNet."""
        return cls()

    @classmethod
    def coco(cls) -> ViewConfig:
        """The paper's settings for pre-training on COCO."""
        return cls(short_sides=tuple(range(480, 801, 32)), max_size=1333)

    @classmethod
    def laptop(cls, view_size: int = 192) -> ViewConfig:
        """Small squares, five regions without near-duplicates."""
        return cls(view_size=view_size, num_regions=5, selection="diverse")

    def with_changes(self, **changes: object) -> ViewConfig:
        """A copy with some settings changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
