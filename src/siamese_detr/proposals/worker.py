"""What a worker process of `propose` does: images in, rows out. Imports neither torch nor Arrow's heavier parts."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from multiprocessing.connection import wait

import cv2
import numpy as np

from siamese_detr.errors import ImageError
from siamese_detr.images.decode import decoded_scale, read_image, read_size
from siamese_detr.proposals.methods import MIN_SIDE, Method, centred_box
from siamese_detr.proposals.shard import Failure, Row


@dataclass(frozen=True, slots=True)
class Job:
    """How the boxes of every image are made.

    Attributes:
        root: folder the paths are relative to.
        method: what computes them.
    """

    root: str
    method: Method


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row or a failure; ``centred``: the method found nothing, and the row has the centred box."""

    result: Row | Failure
    centred: bool = False


def compute(job: Job, paths: Sequence[str]) -> list[Outcome]:
    """The boxes of some images (paths relative to the job's root), one thread, in order."""
    return [compute_one(job, path) for path in paths]


def compute_one(job: Job, path: str) -> Outcome:
    """The boxes of one image; a function of the image, its relative path and the job alone."""
    file = os.path.join(job.root, path)
    try:
        width, height = read_size(file)
        if min(width, height) < MIN_SIDE:
            return Outcome(Failure(path, f"{width}x{height} pixels, a side below {MIN_SIDE}"))
        # The method shrinks the image anyway: JPEGs are decoded no larger than it needs.
        image = read_image(file, min_side=job.method.min_side)
        boxes, scores = job.method.boxes(image, path)
    except ImageError as error:
        return Outcome(Failure(path, error.reason))
    except (cv2.error, MemoryError) as error:
        return Outcome(Failure(path, f"{type(job.method).__name__} failed ({' '.join(str(error).split())[:100]})"))
    centred = not len(boxes)
    if centred:
        boxes, scores = centred_box(width, height)
    else:
        scale = decoded_scale((width, height), image.shape[1::-1])
        boxes = np.clip(boxes / np.tile(scale, 2), 0, [width, height] * 2).astype(np.float32)
    return Outcome(Row(path, width, height, boxes, np.asarray(scores, np.float32)), centred)


def begin() -> None:
    """Set up a worker process: one thread; Ctrl-C is left to the parent, whose end ends this process."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
