"""The verb ``predict``: boxes and pictures for new images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.config import verb
from siamese_detr.errors import UserError
from siamese_detr.evaluation.inference import Detector
from siamese_detr.evaluation.predict_config import PredictConfig
from siamese_detr.evaluation.results import ImageResult, Predictions
from siamese_detr.evaluation.sources import image_list
from siamese_detr.files import write_json, written_aside
from siamese_detr.images.labels import DetectionDataset, LabelledImage
from siamese_detr.images.listing import ImageList
from siamese_detr.images.shards import as_url, member_of
from siamese_detr.images.write import write_labels
from siamese_detr.messages import say


@dataclass
class PredictResult:
    """The outcome of a prediction.

    Args:
        out: the folder written.
        results: one per readable image, in the order of the list.
        class_names: names of the class indices.
    """

    out: Path
    results: Predictions
    class_names: list[str]

    @property
    def boxes(self) -> int:
        """Number of boxes in all images."""
        return self.results.boxes

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """(path, reason) of unreadable images."""
        return self.results.skipped

    def _repr_html_(self) -> str:
        return self.results._repr_html_()


@verb(PredictConfig)
def predict(config: PredictConfig) -> PredictResult:
    """Detect objects in images: JSON with the boxes, and pictures with the boxes drawn.

    Returns:
        the boxes, and where the files are.

    Raises:
        UserError: no usable detector, no readable image, or ``out`` cannot be written.
    """
    images = image_list(config.images, config.out)
    out = Path(config.out)
    if config.labels is not None:
        check_labels(out / "labels", images)
    detector = Detector.load(config.model, config.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another place") from error
    names = set(images.paths)
    originals = {os.path.realpath(images.absolute(k)) for k in range(len(images))} if config.draw else set()

    def draw(result: ImageResult) -> None:
        draw_picture(result, picture_path(out / "pictures", images.paths[result.job.id], names, originals))

    options: dict[str, Any] = {
        "nms": config.nms,
        "top_k": config.top_k,
        "batch_size": config.batch_size,
        "workers": config.workers,
    }
    results = detector.predict(images, config.threshold, each=draw if config.draw else None, **options)
    outcome = PredictResult(out, results, detector.class_names)
    write(out / "predictions.json", document(outcome, images, config))
    write(out / "coco_results.json", results.to_coco())
    if config.labels is not None:
        labelled = pseudo_labels(results, images.root, detector.class_names)
        try:
            if labelled.images:
                write_labels(labelled, out / "labels", config.labels)
        except OSError as error:
            raise UserError(f"cannot write {out / 'labels'}: {error}") from error
        say(f"labels of {len(labelled)} images" + (f": {out / 'labels'}" if labelled.images else ", none written"))
    for path, reason in results.skipped[:5]:
        say(f"cannot read {path}: {reason}")
    written = f"{out / 'predictions.json'}" + (f", {out / 'pictures'}" if config.draw else "")
    say(f"{outcome.boxes} boxes in {len(results)} images, {len(results.skipped)} unreadable: {written}")
    if not outcome.boxes:
        say(
            f"no box scores {100 * results.thresholds.min():.1f} % or more; the highest score is "
            f"{100 * results.highest:.1f} %. Use a lower --threshold."
        )
    return outcome


def check_labels(folder: Path, images: ImageList) -> None:
    """Raise `UserError` if labels cannot be written there."""
    if folder.exists():
        raise UserError(f"{folder} exists, and may have been corrected by hand: move it, or choose another --out")
    if as_url(images.root) is not None or any(map(member_of, images.paths)):
        raise UserError("labels are of image files: unpack the shards, or download the images, and predict there")


def pseudo_labels(results: Predictions, root: Path, class_names: list[str]) -> DetectionDataset:
    """What was found as labels with scores: boxes inside their image, of at least a pixel; without images that have
    none, which may show what the detector does not know."""
    images = []
    for result in results:
        boxes = result.boxes.clip(0, np.tile(result.size, 2))
        sides = boxes[:, 2:] - boxes[:, :2]
        keep = (sides >= 1).all(1)
        if keep.any():
            labels = LabelledImage(
                result.job.id,
                Path(result.job.path),
                *result.size,
                boxes=boxes[keep].astype(np.float32),
                classes=result.classes[keep],
                crowd=np.zeros(keep.sum(), bool),
                areas=sides.prod(1)[keep].astype(np.float32),
                scores=result.scores[keep].astype(np.float32),
            )
            images.append(labels)
    return DetectionDataset(root, class_names, images, category_ids=list(range(1, len(class_names) + 1)))


def picture_path(folder: Path, image: str, images: set[str], originals: set[str]) -> Path:
    """The file for an image's picture: the image's own name, with ``.jpg`` added until it ends so and would replace
    neither an image nor the picture of another image.

    Args:
        folder: of all pictures.
        image, images: names of this image and of all, relative to their folder.
        originals: real paths of all images.
    """
    name = image
    while (
        not name.endswith(".jpg") or (name != image and name in images) or os.path.realpath(folder / name) in originals
    ):
        name += ".jpg"
    return folder / name


def draw_picture(result: ImageResult, path: Path) -> None:
    """Write the picture as JPEG."""
    picture = result.plot()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            picture.save(aside, quality=90)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def document(outcome: PredictResult, images: ImageList, config: PredictConfig) -> dict[str, Any]:
    """``predictions.json``: per image its file, size and objects with label, score and box (xyxy in pixels)."""
    return {
        "model": str(config.model),
        "thresholds": dict(zip(outcome.class_names, outcome.results.thresholds.tolist(), strict=True)),
        "root": str(images.root),
        "images": [
            {
                "id": result.job.id,
                "file_name": images.paths[result.job.id],
                "width": result.size[0],
                "height": result.size[1],
                "objects": [
                    {"label": label, "score": round(score, 5), "box": [round(v, 2) for v in box]}
                    for label, score, box in zip(
                        result.labels, result.scores.tolist(), result.boxes.tolist(), strict=True
                    )
                ],
            }
            for result in outcome.results
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(outcome.class_names)],
        "skipped": [{"path": path, "reason": reason} for path, reason in outcome.skipped],
    }


def write(path: Path, content: Any) -> None:
    try:
        write_json(path, content, indent=1 if isinstance(content, dict) else None)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
