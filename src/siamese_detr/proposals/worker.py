"""What a worker process of `propose` does: an image in, its boxes out. Imports no torch."""

from __future__ import annotations

import os
import signal
import threading
from multiprocessing import parent_process
from multiprocessing.connection import wait

import cv2
import numpy as np

from siamese_detr.errors import ImageError
from siamese_detr.images.decode import decoded_scale, read_image, read_size
from siamese_detr.proposals.methods import MIN_SIDE, Method
from siamese_detr.proposals.shard import StoredImage


def compute(root: str, method: Method, path: str) -> StoredImage | ImageError:
    """The boxes of one image: a function of the image, its relative path and the method alone.

    Args:
        root: folder that ``path`` is relative to.
        method: what computes them.
        path: of the image; the result's is the same.

    Returns:
        the boxes, or why there are none. Where the method finds nothing, the centred box of half the image's width and
        height, of score 0.
    """
    file = os.path.join(root, path)
    try:
        width, height = read_size(file)
        if min(width, height) < MIN_SIDE:
            return ImageError(path, f"{width}x{height} pixels, a side below {MIN_SIDE}")
        # The method shrinks the image anyway: JPEGs are decoded no larger than it needs.
        image = read_image(file, min_side=method.min_side)
        boxes, scores = method.boxes(image, path)
    except ImageError as error:
        return ImageError(path, error.reason)
    except (cv2.error, MemoryError) as error:
        return ImageError(path, f"{type(method).__name__} failed ({' '.join(str(error).split())[:100]})")
    if len(boxes):
        scale = decoded_scale((width, height), image.shape[1::-1])
        boxes = np.clip(boxes / np.tile(scale, 2), 0, [width, height] * 2)
    else:
        boxes, scores = np.array([[0.25, 0.25, 0.75, 0.75]]) * [width, height, width, height], np.zeros(1)
    return StoredImage(path, width, height, boxes.astype(np.float32), np.asarray(scores, np.float32))


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
