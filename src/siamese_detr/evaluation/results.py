"""What a detector finds: boxes as arrays, as a picture, and in the forms of other packages."""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms

from siamese_detr.errors import UserError
from siamese_detr.evaluation.coco import Detections
from siamese_detr.evaluation.draw import draw_detections
from siamese_detr.images.decode import read_image

SHOWN = 12
"""Pictures that a notebook shows of many."""


@dataclass(frozen=True)
class Job:
    """One image in which to detect objects.

    Args:
        id: carried over to the detections.
        path: of the file, or a URL; of an image in memory, what to call it.
        size: (width, height) to which the boxes shall refer; None: the file's own.
        pixels: (H, W, 3) uint8 of an image in memory.
    """

    id: int
    path: str
    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = field(default=None, compare=False)

    def read(self) -> np.ndarray:
        """The image, (H, W, 3) uint8.

        Raises:
            ImageError: it cannot be read.
        """
        return read_image(self.path) if self.pixels is None else self.pixels


@dataclass(frozen=True, repr=False)
class ImageResult:
    """The objects found in one image, best first.

    Args:
        job: the image.
        size: (width, height) to which the boxes refer.
        classes: (N,) int64 indices into ``class_names``.
        scores: (N,) float64 in [0, 1].
        boxes: (N, 4) float64 xyxy in pixels, as the image processor gives them: they may stick out of the image.
        class_names: of the detector.
        problem: why there are no detections: the file cannot be read, or the image processor refuses it.
    """

    job: Job
    size: tuple[int, int] = (0, 0)
    classes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    class_names: Sequence[str] = ()
    problem: str | None = None

    @property
    def labels(self) -> list[str]:
        """The class name of each box."""
        return [self.class_names[k] for k in self.classes.tolist()]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.labels).most_common(5))
        return f"<{self.job.path}: {self.problem or counts or 'nothing found'}>"

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        picture = self.plot()
        picture.thumbnail((640, 640))
        picture.save(buffer, "JPEG", quality=85)
        code = base64.b64encode(buffer.getvalue()).decode()
        caption = f"<figcaption>{html.escape(repr(self))}</figcaption>"
        return f'<figure><img src="data:image/jpeg;base64,{code}">{caption}</figure>'

    def above(self, thresholds: np.ndarray) -> ImageResult:
        """Only the boxes that score at least what ``thresholds``, (classes,), holds for their class."""
        keep = self.scores >= thresholds[self.classes]
        return replace(self, classes=self.classes[keep], scores=self.scores[keep], boxes=self.boxes[keep])

    def without_duplicates(self, overlap: float) -> ImageResult:
        """Without the boxes whose IoU with a better one of their class is above ``overlap``. After a short training, a
        DETR's queries do not yet all keep off each other's objects."""
        classes, scores, boxes = map(torch.from_numpy, (self.classes, self.scores, self.boxes))
        keep = batched_nms(boxes, scores, classes, overlap).numpy()
        return replace(self, classes=self.classes[keep], scores=self.scores[keep], boxes=self.boxes[keep])

    def detections(self, class_map: np.ndarray | None = None) -> Detections:
        """As rows; ``class_map`` translates class indices, −1 drops a class."""
        classes = self.classes if class_map is None else class_map[self.classes]
        keep = classes >= 0
        images = np.full(int(keep.sum()), self.job.id, np.int64)
        return Detections(images, classes[keep], self.scores[keep], self.boxes[keep])

    def plot(self) -> Image.Image:
        """The picture with the boxes drawn.

        Returns:
            an RGB picture, enlarged if its longer side is below 640 pixels.

        Raises:
            ImageError: the file cannot be read any more.
        """
        return draw_detections(self.job.read(), self.boxes, self.classes, self.scores, self.class_names)

    def to_coco(self) -> list[dict[str, Any]]:
        """COCO's results format.

        Returns:
            for each box ``image_id`` (the image's position), ``category_id`` (the class index), ``bbox`` (x, y, width,
            height in pixels) and ``score``.
        """
        return self.detections().to_coco(list(range(len(self.class_names))))

    def to_supervision(self) -> Any:
        """For the package ``supervision``, which has trackers, counters and drawings.

        Returns:
            ``supervision.Detections``, with the class names in ``data["class_name"]``.

        Raises:
            UserError: the package is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError("the package supervision is not installed: pip install supervision") from None
        return supervision.Detections(
            xyxy=self.boxes.astype(np.float32),
            confidence=self.scores.astype(np.float32),
            class_id=self.classes,
            data={"class_name": np.array(self.labels, dtype=str)},
        )


class Predictions(list[ImageResult]):
    """The results of several images, in their order.

    Args:
        results: one per readable image.
        thresholds: (classes,) scores from which on boxes were kept.
        highest: the highest score of all boxes, also of those not kept.
        skipped: (path, reason) of unreadable images.
    """

    def __init__(
        self,
        results: Sequence[ImageResult],
        thresholds: np.ndarray,
        highest: float = 0.0,
        skipped: Sequence[tuple[str, str]] = (),
    ) -> None:
        super().__init__(results)
        self.thresholds, self.highest, self.skipped = thresholds, highest, list(skipped)

    @property
    def boxes(self) -> int:
        """Number of boxes in all images."""
        return sum(map(len, self))

    def __repr__(self) -> str:
        unreadable = f", {len(self.skipped)} unreadable" if self.skipped else ""
        return f"<{self.boxes} boxes in {len(self)} images{unreadable}>"

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>" + "".join(result._repr_html_() for result in self[:SHOWN])

    def to_coco(self) -> list[dict[str, Any]]:
        """The boxes of all images, see :meth:`ImageResult.to_coco`."""
        return [row for result in self for row in result.to_coco()]
