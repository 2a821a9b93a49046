"""What can be given to a detector to look at: files, folders, URLs and images in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from siamese_detr.errors import ImageError
from siamese_detr.evaluation.results import Job
from siamese_detr.images.decode import as_pixels, read_size
from siamese_detr.images.listing import EXTENSIONS, ImageList, list_images
from siamese_detr.images.shards import SUFFIXES, as_url


def image_list(source: str | Path, without: str | Path | None = None) -> ImageList:
    """The images that ``source`` names, but those in the folder ``without``: also a single file, or the URL of one."""
    url = as_url(source)
    if url is not None and url.startswith("http") and not url.lower().endswith(SUFFIXES):
        folder, _, name = url.rpartition("/")
        return ImageList(Path(folder), [name])
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if url is None and path.is_file() and path.suffix.lower().lstrip(".") in EXTENSIONS:
        return ImageList(path.parent, [path.name])
    return list_images(source, without=without)


def jobs_of(images: Any) -> tuple[list[Job], list[tuple[str, str]], list[str]]:
    """The images to look at, numbered in the order given.

    Args:
        images: see :meth:`siamese_detr.evaluation.inference.Detector.predict`.

    Returns:
        the jobs, (path, reason) of images that cannot be read, and what was left out of folders.

    Raises:
        UserError: a path that leads to no image, or an object that is no image.
    """
    jobs: list[Job] = []
    skipped: list[tuple[str, str]] = []
    problems: list[str] = []
    number = 0
    for source in images if isinstance(images, Iterable) and is_many(images) else [images]:
        if isinstance(source, str | os.PathLike | ImageList):
            listed = source if isinstance(source, ImageList) else image_list(source)  # type: ignore[arg-type]
            problems += listed.problems
            for path in map(listed.absolute, range(len(listed))):
                try:
                    # A file behind a URL is fetched once, to be decoded.
                    jobs.append(Job(number, path, read_size(path) if as_url(path) is None else None))
                except ImageError as error:
                    skipped.append((error.path, error.reason))
                number += 1
        else:
            pixels = as_pixels(source, f"image {number}")
            jobs.append(Job(number, f"image {number}", (pixels.shape[1], pixels.shape[0]), pixels))
            number += 1
    return jobs, skipped, problems


def is_many(images: Any) -> bool:
    """Whether an object holds several images, and is none itself."""
    return not isinstance(images, str | os.PathLike | ImageList | Image.Image) and not hasattr(images, "__array__")
