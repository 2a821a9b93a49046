"""What a worker process of `propose` does: images in, rows out. Imports neither torch nor Arrow's heavier parts."""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait

import cv2
import numpy as np

from siamese_detr.errors import ImageError
from siamese_detr.images.decode import decoded_scale, read_image, read_size
from siamese_detr.proposals import methods
from siamese_detr.proposals.shard import Failure, Row
from siamese_detr.randomness import rng

MIN_SIDE = 16


@dataclass(frozen=True, slots=True)
class Job:
    """How the boxes of every image are made.

    Attributes:
        root: folder the paths are relative to.
        method: "edge-boxes", "selective-search" or "random".
        max_boxes: at most so many per image.
        mode: of Selective Search: "fast" or "full".
        edge_model: path of a structured-forest edge model, or None.
        seed: of the random boxes.
    """

    root: str
    method: str
    max_boxes: int = 512
    mode: str = "fast"
    edge_model: str | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row or a failure, and where the row's boxes came from (`methods.Proposals.origin`)."""

    result: Row | Failure
    origin: str = "image"


def compute(job: Job, paths: Sequence[str]) -> list[Outcome]:
    """The boxes of some images (paths relative to the job's root), one thread, in order."""
    return [compute_one(job, path) for path in paths]


def compute_one(job: Job, path: str) -> Outcome:
    """The boxes of one image; a function of the image, its relative path (random boxes) and the job alone."""
    file = os.path.join(job.root, path)
    try:
        width, height = read_size(file)
        if min(width, height) < MIN_SIDE:
            return Outcome(Failure(path, f"{width}x{height} pixels, a side below {MIN_SIDE}"))
        # The method shrinks the image anyway: JPEGs are decoded no larger than it needs.
        image = read_image(file, min_side=_decoded_side(job))
        found = _boxes(job, path, image, width, height)
    except ImageError as error:
        return Outcome(Failure(path, error.reason))
    except (cv2.error, MemoryError) as error:
        return Outcome(Failure(path, f"{job.method} failed ({' '.join(str(error).split())[:100]})"))
    scale = decoded_scale((width, height), image.shape[1::-1])
    boxes = np.clip(found.boxes / np.tile(scale, 2), 0, [width, height] * 2).astype(np.float32)
    return Outcome(Row(path, width, height, boxes, found.scores), found.origin)


def _decoded_side(job: Job) -> int | None:
    if job.method == "edge-boxes":
        return methods.EdgeBoxesSettings().side
    if job.method == "selective-search":
        full = job.mode == "full"
        return methods.SELECTIVE_SEARCH_FULL_SIDE if full else methods.SELECTIVE_SEARCH_FAST_SIDE
    return MIN_SIDE  # random boxes need only know that the file can be decoded


def _boxes(job: Job, path: str, image: np.ndarray, width: int, height: int) -> methods.Proposals:
    if job.method == "edge-boxes":
        return methods.edge_boxes(image, job.max_boxes, job.edge_model)
    if job.method == "selective-search":
        return methods.selective_search(image, job.mode, job.max_boxes)
    generator = rng(job.seed, zlib.crc32(path.encode()))
    return methods.random_boxes(image.shape[1], image.shape[0], generator, min(job.max_boxes, 100))


def begin() -> None:
    """Set up a worker process: one thread, deaf to Ctrl-C (the parent decides), gone when the parent is."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
