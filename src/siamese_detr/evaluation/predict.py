"""The verb ``predict``: boxes and pictures for new images."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.config import verb
from siamese_detr.errors import ImageError, UserError
from siamese_detr.evaluation.draw import draw_detections
from siamese_detr.evaluation.inference import Detector, ImageResult, Job, run
from siamese_detr.evaluation.predict_config import PredictConfig
from siamese_detr.files import write_json, written_aside
from siamese_detr.images.decode import read_image, read_size
from siamese_detr.images.listing import EXTENSIONS, ImageList, list_images
from siamese_detr.messages import say, track


@dataclass
class PredictResult:
    """The outcome of a prediction.

    Args:
        out: the folder written.
        results: one per readable image, in the order of the list.
        class_names: names of the class indices.
        skipped: (path, reason) of unreadable images.
    """

    out: Path
    results: list[ImageResult]
    class_names: list[str]
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def boxes(self) -> int:
        """Number of boxes in all images."""
        return sum(len(result.scores) for result in self.results)


@verb(PredictConfig)
def predict(config: PredictConfig) -> PredictResult:
    """Detect objects in images: JSON with the boxes, and pictures with the boxes drawn.

    Raises:
        UserError: no usable detector, no readable image, or ``out`` cannot be written.
    """
    images = image_list(config.images)
    out = Path(config.out)
    detector = Detector.load(config.model, config.device)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; choose another place") from error
    for problem in images.problems[:5]:
        say(f"left out: {problem}")

    jobs, skipped = [], []
    for index in range(len(images)):
        try:
            jobs.append(Job(index, images.absolute(index), read_size(images.absolute(index))))
        except ImageError as error:
            skipped.append((error.path, error.reason))
    detected = run(detector, jobs, batch_size=config.batch_size, workers=config.workers, top_k=config.top_k)
    results = []
    originals = {os.path.realpath(job.path) for job in jobs} if config.draw else set()
    names = set(images.paths)
    highest, thresholds = 0.0, detector.thresholds(config.threshold)
    for result in track(detected, "predicting", len(jobs)):
        if result.problem is not None:
            skipped.append((result.job.path, result.problem))
            continue
        highest = max(highest, result.scores.max(initial=0.0))
        result = result.above(thresholds)
        results.append(result)
        if config.draw:
            picture = picture_path(out / "pictures", images.paths[result.job.id], names, originals)
            draw_picture(result, detector.class_names, picture)
    results.sort(key=lambda result: result.job.id)
    skipped.sort()
    if not results:
        path, reason = skipped[0]
        raise UserError(f"none of the {len(images)} images in {config.images} can be read, e.g. {path}: {reason}")
    outcome = PredictResult(out, results, detector.class_names, skipped)
    write(out / "predictions.json", document(outcome, images, config, thresholds))
    write(out / "coco_results.json", coco_results(outcome))
    for path, reason in skipped[:5]:
        say(f"cannot read {path}: {reason}")
    written = f"{out / 'predictions.json'}" + (f", {out / 'pictures'}" if config.draw else "")
    say(f"{outcome.boxes} boxes in {len(results)} images, {len(skipped)} unreadable: {written}")
    if not outcome.boxes:
        say(
            f"no box scores {100 * thresholds.min():.1f} % or more; the highest score is {100 * highest:.1f} %. Use a "
            "lower --threshold."
        )
    return outcome


def image_list(source: str) -> ImageList:
    """The images that ``source`` names: also a single file."""
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.is_file() and path.suffix.lower().lstrip(".") in EXTENSIONS:
        return ImageList(path.parent, [path.name])
    return list_images(source)


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


def draw_picture(result: ImageResult, names: list[str], path: Path) -> None:
    """Write the picture as JPEG."""
    image = read_image(result.job.path)
    picture = draw_detections(image, result.boxes, result.classes, result.scores, names)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            picture.save(aside, quality=90)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def document(
    outcome: PredictResult, images: ImageList, config: PredictConfig, thresholds: np.ndarray
) -> dict[str, Any]:
    """``predictions.json``: per image its file, size and objects with label, score and box (xyxy in pixels)."""
    return {
        "model": str(config.model),
        "thresholds": dict(zip(outcome.class_names, thresholds.tolist(), strict=True)),
        "root": str(images.root),
        "images": [
            {
                "id": result.job.id,
                "file_name": images.paths[result.job.id],
                "width": result.size[0],
                "height": result.size[1],
                "objects": [
                    {"label": outcome.class_names[k], "score": round(score, 5), "box": [round(v, 2) for v in box]}
                    for k, score, box in zip(
                        result.classes.tolist(), result.scores.tolist(), result.boxes.tolist(), strict=True
                    )
                ],
            }
            for result in outcome.results
        ],
        "categories": [{"id": k, "name": name} for k, name in enumerate(outcome.class_names)],
        "skipped": [{"path": path, "reason": reason} for path, reason in outcome.skipped],
    }


def coco_results(outcome: PredictResult) -> list[dict[str, Any]]:
    """COCO's results format; image ids are those of ``predictions.json``, category ids its categories'."""
    ids = list(range(len(outcome.class_names)))
    return [row for result in outcome.results for row in result.detections(np.array(ids)).to_coco(ids)]


def write(path: Path, content: Any) -> None:
    try:
        write_json(path, content, indent=1 if isinstance(content, dict) else None)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
