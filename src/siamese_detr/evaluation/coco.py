"""COCO's detection metrics, overall and per class, from plain arrays (computed by ``faster-coco-eval``)."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from rich import box
from rich.markup import escape
from rich.table import Table

from siamese_detr.files import write_json, written_aside
from siamese_detr.messages import as_html

MAX_DETECTIONS = (1, 10, 100)
AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True)
class Detections:
    """Detections of many images, one row each.

    Args:
        images: (N,) int64, image ids of the data set.
        classes: (N,) int64, contiguous class indices.
        scores: (N,) float64 in [0, 1].
        boxes: (N, 4) float64, xyxy in pixels of the original image.
    """

    images: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def empty(cls) -> Detections:
        return cls.from_rows(np.zeros((0, 7)))

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> Detections:
        """From (N, 7) float64 rows ``image, class, score, x1, y1, x2, y2`` (float64 holds ids up to 2^53 exactly)."""
        rows = np.asarray(rows, np.float64).reshape(-1, 7)
        return cls(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2], rows[:, 3:])

    def of_images(self, ids: list[int]) -> Detections:
        """Those in the images of these ids."""
        keep = np.isin(self.images, ids)
        return Detections(self.images[keep], self.classes[keep], self.scores[keep], self.boxes[keep])

    def above(self, thresholds: np.ndarray) -> Detections:
        """Those that score at least what their class must, (classes,) in [0, 1]."""
        keep = self.scores >= thresholds[self.classes]
        return Detections(self.images[keep], self.classes[keep], self.scores[keep], self.boxes[keep])

    def sorted(self) -> Detections:
        """By image, then best score first: the same order however the images were shared among processes."""
        order = np.lexsort((self.boxes[:, 0], self.classes, -self.scores, self.images))
        return Detections(self.images[order], self.classes[order], self.scores[order], self.boxes[order])

    @classmethod
    def concatenate(cls, parts: list[Detections]) -> Detections:
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in [cls.empty(), *parts]]) for name in names))

    def write(self, path: Path) -> None:
        """Write a NumPy archive (.npz) of the four arrays; numbers in float32, as detectors compute them."""
        with written_aside(path) as aside:
            np.savez_compressed(
                aside,
                images=self.images,
                classes=self.classes,
                scores=self.scores.astype(np.float32),
                boxes=self.boxes.astype(np.float32),
            )

    @classmethod
    def read(cls, path: Path) -> Detections:
        """From what :meth:`write` wrote. Raises OSError or ValueError where it cannot be read."""
        with np.load(path, allow_pickle=False) as arrays:
            scores, boxes = arrays["scores"].astype(np.float64), arrays["boxes"].astype(np.float64)
            return cls(arrays["images"], arrays["classes"], scores, boxes)

    def to_coco(self, category_ids: list[int]) -> list[dict[str, Any]]:
        """COCO's results format: ``image_id, category_id, bbox (x, y, w, h), score``."""
        xywh = np.concatenate([self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]], axis=1)
        return [
            {"image_id": image, "category_id": category_ids[label], "bbox": box, "score": score}
            for image, label, box, score in zip(
                self.images.tolist(), self.classes.tolist(), xywh.tolist(), self.scores.tolist(), strict=True
            )
        ]


@dataclass(frozen=True)
class ClassMetrics:
    """One class; metrics are in [0, 1], None if there is no box of this class to find.

    Args:
        name: of the class.
        ap, ap50, ap75, ar100: average precisions and recall.
        boxes: how many there are to find.
        precision50: at IoU 0.50, the precision at the recalls 0, 0.01, … 1, made monotone as COCO does; 0 where the
            recall is never reached.
        threshold: the score, in [0, 1], at and above which F1 (of that precision and recall) is highest.
    """

    name: str
    ap: float | None
    ap50: float | None
    ap75: float | None
    ar100: float | None
    boxes: int
    precision50: tuple[float, ...] = ()
    threshold: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Name, AP, AP50, AP75, AR100, boxes, threshold."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k != "precision50"}
        return {k.upper() if k.startswith(("ap", "ar")) else k: v for k, v in values.items()}


@dataclass(frozen=True)
class CocoMetrics:
    """COCO's twelve numbers, in [0, 1]; None where the data set has no such box. AP is the mean over IoU 0.50:0.95."""

    ap: float | None = None
    ap50: float | None = None
    ap75: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    ar1: float | None = None
    ar10: float | None = None
    ar100: float | None = None
    ar_small: float | None = None
    ar_medium: float | None = None
    ar_large: float | None = None
    per_class: list[ClassMetrics] = field(default_factory=list)

    def overall(self) -> dict[str, float | None]:
        """The twelve numbers under COCO's names: AP, AP50, AP75, AP_small, … AR_large."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "per_class"]
        return {name[:2].upper() + name[2:]: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """:meth:`overall`, and ``classes``: see :meth:`ClassMetrics.to_dict`."""
        return {**self.overall(), "classes": [row.to_dict() for row in self.per_class]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CocoMetrics:
        """The metrics that :meth:`to_dict` wrote, as in a line of history.jsonl."""
        classes = [ClassMetrics(**{name.lower(): value for name, value in row.items()}) for row in values["classes"]]
        return cls(*(values[name] for name in cls().overall()), per_class=classes)  # type: ignore[misc]

    def write(self, path: str | Path) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), self.to_dict(), indent=2)

    def _repr_html_(self) -> str:
        return as_html(self.table())

    def table(self) -> Table:
        """A table for the terminal, in percent: the overall line, then the classes."""
        parts = {"APs": self.ap_small, "APm": self.ap_medium, "APl": self.ap_large, "AR1": self.ar1, "AR10": self.ar10}
        others = "  ".join(f"{name} {percent(value)}" for name, value in parts.items())
        caption = f"in percent; – : no such box; threshold: the score of highest F1\n{others}"
        table = Table(caption=caption, box=box.SIMPLE, pad_edge=False)
        table.add_column("class", min_width=8, overflow="fold")
        for name in ("boxes", "AP", "AP50", "AP75", "AR100", "threshold"):
            table.add_column(name, justify="right")
        boxes = sum(row.boxes for row in self.per_class)
        overall = map(percent, (self.ap, self.ap50, self.ap75, self.ar100))
        table.add_row("all", str(boxes), *overall, "", style="bold", end_section=True)
        for row in self.per_class:
            values = map(percent, (row.ap, row.ap50, row.ap75, row.ar100, row.threshold))
            table.add_row(escape(row.name), str(row.boxes), *values)
        return table


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def coco_metrics(ground_truth: dict[str, Any], detections: Detections) -> CocoMetrics:
    """Score ``detections`` against a COCO data set.

    Args:
        ground_truth: ``images``, ``annotations`` (boxes in xywh pixels; ``iscrowd`` boxes are neither to be found nor
            counted against a detection) and ``categories``; class index k of the detections means ``categories[k]``.
        detections: of images of this data set; the best 100 per image and class count. The boxes of images without
            any are counted as missed.
    """
    category_ids = [category["id"] for category in ground_truth["categories"]]
    truth = COCO()
    truth.dataset = {
        "images": [dict(image) for image in ground_truth["images"]],
        # Ids from 1: the evaluation keeps 0 for "unmatched".
        "annotations": [
            {**a, "id": i, "iscrowd": int(a.get("iscrowd", 0)), "area": a.get("area", a["bbox"][2] * a["bbox"][3])}
            for i, a in enumerate(ground_truth["annotations"], 1)
        ],
        "categories": [dict(category) for category in ground_truth["categories"]],
    }
    truth.createIndex()
    found = truth.loadRes(detections.sorted().to_coco(category_ids)) if len(detections) else truth.loadRes([])
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=lambda *_: None)
    evaluation.params.maxDets = list(MAX_DETECTIONS)
    # COCOeval sorts the categories by id: remember where each class went.
    columns = {category: column for column, category in enumerate(sorted(category_ids))}
    evaluation.evaluate()
    evaluation.accumulate()
    # precision: (IoU thresholds, recalls, classes, areas, max detections); recall: the same without recalls.
    # -1 means undefined.
    precision = np.asarray(evaluation.eval["precision"])
    recall = np.asarray(evaluation.eval["recall"])
    scores = np.asarray(evaluation.eval["scores"])  # as precision: the lowest score that gives this recall

    def ap(iou: int | slice = slice(None), area: str = "all", label: Any = slice(None)) -> float | None:
        return mean_defined(precision[iou, :, label, AREAS.index(area), -1])

    def ar(most: int = 100, area: str = "all", label: Any = slice(None)) -> float | None:
        return mean_defined(recall[:, label, AREAS.index(area), MAX_DETECTIONS.index(most)])

    at50, at75 = 0, 5  # IoU thresholds are 0.50, 0.55, …
    boxes = Counter(a["category_id"] for a in truth.dataset["annotations"] if not a["iscrowd"])
    per_class = []
    for category in ground_truth["categories"]:
        k, count = columns[category["id"]], boxes[category["id"]]
        curve = tuple(precision[at50, :, k, 0, -1].tolist()) if count else ()
        aps = (ap(label=k), ap(at50, label=k), ap(at75, label=k))
        threshold = best_threshold(precision[at50, :, k, 0, -1], scores[at50, :, k, 0, -1]) if count else None
        per_class.append(ClassMetrics(category["name"], *aps, ar(label=k), count, curve, threshold))
    averages = [ap(), ap(at50), ap(at75), *(ap(area=area) for area in AREAS[1:])]
    recalls = [*(ar(most) for most in MAX_DETECTIONS), *(ar(area=area) for area in AREAS[1:])]
    return CocoMetrics(*averages, *recalls, per_class=per_class)  # type: ignore[misc,arg-type]


def best_threshold(precision: np.ndarray, scores: np.ndarray) -> float | None:
    """The score of the highest F1, rounded down to four digits; None if nothing was found.

    Args:
        precision: at the recalls 0, 0.01, ... 1.
        scores: the lowest score that gives each of these recalls.
    """
    recall = np.linspace(0, 1, len(precision))
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax())
    return math.floor(scores[best] * 1e4) / 1e4 if f1[best] > 0 else None


def mean_defined(values: np.ndarray) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
