"""Running a detector over images: any Hugging Face object detector, with its own image processor.

Only images that the processor resizes to the same shape share a batch, so nothing is padded. The boxes are those of
``transformers.pipeline("object-detection")``, whatever the batch size, the order or the number of processes.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from siamese_detr.detectors.loading import open_detector
from siamese_detr.errors import ImageError, UserError
from siamese_detr.evaluation.results import ImageResult, Job, Predictions
from siamese_detr.evaluation.runtimes import ExportedModel, exported_file
from siamese_detr.evaluation.sources import jobs_of
from siamese_detr.kernels import accelerate
from siamese_detr.messages import say, track
from siamese_detr.runtime.hardware import choose_device
from siamese_detr.runtime.loading import Loader
from siamese_detr.runtime.processes import machine_explained

DEFAULT_THRESHOLD = 0.5
"""Of detectors that store none."""


@dataclass(repr=False)
class Detector:
    """A model with its image processor and class names.

    Args:
        model: a Transformers object detector.
        processor: its image processor.
        device: where the model is.
    """

    model: nn.Module
    processor: Any
    device: torch.device

    def __repr__(self) -> str:
        names = self.class_names
        shown = ", ".join(names[:5]) + ", …" * (len(names) > 5)
        return f"<{self.model.config.model_type} detector of {len(names)} classes ({shown}) on {self.device}>"  # type: ignore[union-attr]

    @property
    def class_names(self) -> list[str]:
        """The classes, in the order of their indices."""
        names: dict[int, str] = self.model.config.id2label  # type: ignore[union-attr,assignment]
        return [names.get(k, f"LABEL_{k}") for k in range(max(names, default=-1) + 1)]

    def thresholds(self, wanted: float | None = None) -> np.ndarray:
        """(classes,) scores from which on a box counts: ``wanted`` for all, else those that fine-tuning stored.

        Raises:
            UserError: ``wanted`` is outside [0, 1].
        """
        if wanted is not None and not 0 <= wanted <= 1:
            raise UserError(f"threshold must be between 0 and 1, not {wanted}")
        stored = getattr(self.model.config, "score_thresholds", None)
        count = len(self.class_names)
        if wanted is None and isinstance(stored, list) and len(stored) == count:
            return np.array(stored, np.float64)
        return np.full(count, DEFAULT_THRESHOLD if wanted is None else wanted)

    @classmethod
    def load(cls, source: str | Path, device: str = "auto", *, without_classes: bool = False) -> Detector:
        """Load a detector, once for any number of images.

        Args:
            source: a run, a Hugging Face directory, a name on the Hub, a .pth of the papers' codes, or what ``export``
                wrote as ONNX or OpenVINO.
            device: auto (the accelerator, if there is one), cpu, cuda, cuda:1, mps, ...
            without_classes: also take a detector that has only been pre-trained: its class head says nothing.

        Returns:
            the detector, whose ``predict`` finds objects in images.

        Raises:
            UserError: no detector there, none with classes, or damaged or unsafe (pickled) weights.
        """
        stored = open_detector(source)
        if stored.only_pretrained and not without_classes:
            raise UserError(f"{stored.path} has only been pre-trained and has no classes yet; fine-tune it first")
        if (file := exported_file(stored.path)) is not None:
            return cls(ExportedModel(file, stored.config), stored.load_processor(), torch.device("cpu"))
        model, info = stored.load_model()
        if lost := sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}):
            raise UserError(
                f"{stored.path} is damaged: its weights lack {len(lost)} tensors or have others in their place, e.g. "
                f"{lost[0]}; fetch or save it again"
            )
        processor = stored.load_processor()
        place = choose_device(device)
        model = model.to(place).eval()  # type: ignore[arg-type]  # a device is what it takes
        accelerate(model, place)
        return cls(model, processor, place)

    def predict(
        self,
        images: Any,
        threshold: float | None = None,
        *,
        nms: float = 0.8,
        top_k: int = 100,
        batch_size: int = 8,
        workers: int = 0,
        each: Callable[[ImageResult], None] | None = None,
    ) -> Predictions:
        """Find objects in images.

        Args:
            images: the path or URL of an image, a folder (searched recursively), a list file (.txt), a COCO JSON, a
                Pillow image, an array (height, width, 3) of uint8 in RGB order, or a list of these.
            threshold: boxes must score at least this, 0 to 1; default: for each class the score of highest F1 on the
                validation images, which fine-tuning stores with the detector, else 0.5.
            nms: of two boxes of a class whose IoU is above this, the one with the lower score is left out; 1: none is.
            top_k: most boxes per image.
            batch_size: images per forward pass.
            workers: data processes.
            each: called with every result as soon as it is there, in no particular order.

        Returns:
            a list with one result per readable image, in the order given, with ``skipped`` for the others.

        Raises:
            UserError: no image, or none that can be read.
        """
        jobs, skipped, problems = jobs_of(images)
        for problem in problems[:5]:
            say(f"left out: {problem}")
        results, highest, thresholds = [], 0.0, self.thresholds(threshold)
        detected = run(self, jobs, batch_size=batch_size, workers=workers, top_k=top_k)
        for result in track(detected, "predicting", len(jobs)):
            if result.problem is not None:
                skipped.append((result.job.path, result.problem))
                continue
            highest = max(highest, result.scores.max(initial=0.0))
            results.append(result.above(thresholds).without_duplicates(nms))
            if each is not None:
                each(results[-1])
        skipped.sort()
        if not results and skipped:
            path, reason = skipped[0]
            raise UserError(f"none of the {len(skipped)} images can be read, e.g. {path}: {reason}")
        results.sort(key=lambda result: result.job.id)
        return Predictions(results, thresholds, highest, skipped)

    @torch.no_grad()  # not inference_mode: position embeddings that models cache must stay usable in training
    def detect(self, inputs: dict[str, Tensor], sizes: Sequence[tuple[int, int]], top_k: int) -> list:
        """Boxes of a batch of equally large images.

        Args:
            inputs: of the processor, batched: pixel_values (B, 3, H, W) and perhaps pixel_mask (B, H, W).
            sizes: (width, height) per image to which boxes shall refer.
            top_k: most boxes per image.

        Returns:
            per image (classes, scores, boxes) as in :class:`ImageResult`.
        """
        outputs = self.model(**{name: value.to(self.device) for name, value in inputs.items()})
        process = self.processor.post_process_object_detection
        options = {"top_k": top_k} if "top_k" in inspect.signature(process).parameters else {}
        heights_widths = torch.tensor([(height, width) for width, height in sizes])
        results = process(outputs, threshold=0.0, target_sizes=heights_widths.to(self.device), **options)
        detections = []
        for result in results:
            scores = result["scores"].cpu().double().numpy()
            best = np.argsort(-scores, kind="stable")[:top_k]
            boxes = result["boxes"].cpu().double().numpy().reshape(-1, 4)
            detections.append((result["labels"].cpu().numpy()[best], scores[best], boxes[best]))
        return detections


class InferenceImages(Dataset):
    """Images decoded and processed one by one, in data workers."""

    def __init__(self, jobs: Sequence[Job], processor: Any) -> None:
        self.jobs, self.processor = jobs, processor

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, index: int) -> tuple[int, tuple[int, int], dict[str, Tensor] | str]:
        """Index, (width, height) of the file, and the processor's output, or why there is none (str)."""
        try:
            image = self.jobs[index].read()
        except ImageError as error:
            return index, (0, 0), error.reason
        height, width = image.shape[:2]
        try:
            inputs = self.processor(images=[Image.fromarray(image)], return_tensors="pt")
        except ValueError as error:  # for example, resizing leaves no pixel of the short side
            reason = (str(error).splitlines() or [""])[0][:100]
            return index, (0, 0), f"the detector's image processor cannot take {width}x{height} pixels ({reason})"
        return index, (width, height), {name: inputs[name] for name in inputs if name != "labels"}


def same_shape_batches(shapes: Sequence[tuple[int, int]], batch_size: int) -> list[list[int]]:
    """Indices of equally large images in batches of at most ``batch_size``, the same in every process."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(index)
    return [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]


def run(
    detector: Detector,
    jobs: Sequence[Job],
    *,
    batch_size: int = 8,
    workers: int = 0,
    top_k: int = 100,
    rank: int = 0,
    world: int = 1,
    each_batch: Callable[[], None] = lambda: None,
) -> Iterator[ImageResult]:
    """Detect in every image of ``jobs`` (this process's share of them), in no particular order.

    Args:
        detector: the detector; its model must be in evaluation mode.
        jobs: the images.
        batch_size: most images in one forward pass.
        workers: data processes.
        top_k: most boxes per image.
        rank, world: this process and the number of processes that share the work.
        each_batch: called before every batch, equally often in all processes; ends the work by raising.
    """
    size = getattr(detector.processor, "size", None) or {}
    square = bool(dict(size).get("height") and dict(size).get("width"))
    shapes = [(0, 0) if square else job.size or (-1, index) for index, job in enumerate(jobs)]
    all_batches = same_shape_batches(shapes, batch_size)
    batches = all_batches[rank::world]
    idle = -(-len(all_batches) // world) - len(batches)  # rounds in which only other processes have a batch
    names = detector.class_names
    loader = Loader(InferenceImages(jobs, detector.processor), batches, list, min(workers, len(batches)))
    explained = machine_explained("start it again (with --resume, where the command has that)")
    with explained:
        for samples in itertools.chain(loader, itertools.repeat([], idle)):
            each_batch()
            # The size of a file may differ from the labels: trust the tensors.
            groups: dict[tuple, list] = {}
            for index, size, inputs in samples:
                if isinstance(inputs, str):
                    yield ImageResult(jobs[index], problem=inputs)
                else:
                    key = tuple((name, *value.shape) for name, value in inputs.items())
                    groups.setdefault(key, []).append((index, size, inputs))
            for group in groups.values():
                sizes = [jobs[index].size or size for index, size, _ in group]
                inputs = {name: torch.cat([item[2][name] for item in group]) for name in group[0][2]}
                outputs = detector.detect(inputs, sizes, top_k)
                for (index, _, _), image_size, (classes, scores, boxes) in zip(group, sizes, outputs, strict=True):
                    yield ImageResult(jobs[index], image_size, classes, scores, boxes, names)


def gather(mine: list[Any]) -> list[Any]:
    """The items of all processes, one process after another; with one process, its own."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, mine)
    return list(itertools.chain.from_iterable(parts))
