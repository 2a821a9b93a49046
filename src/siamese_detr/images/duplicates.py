"""Fingerprints of images, and finding those that are the same or nearly so."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.decode import open_image, read_image, read_size

MIN_CORRELATION = 0.985
"""Of the thumbnails of pictures that count as the same. 548 VOC photos that were saved again at two thirds of their
size and JPEG quality 40 all correlate above 0.99 with themselves, and of the 15 million pairs of 5,476 different photos
none does above 0.985."""
_THUMB = 16
_MIN_CONTRAST = 4.0
_NEIGHBOURS = 16


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one decoded image looks like.

    Args:
        path: the file.
        width: pixels, upright.
        height: pixels, upright.
        digest: hash of the file's bytes.
        thumb: 256 bytes, 16x16 grey values.
    """

    path: str
    width: int
    height: int
    digest: bytes
    thumb: bytes


def fingerprint(path: str) -> Fingerprint | ImageError:
    """Decode an image (all of its data, at reduced scale where the format allows); the error, where that fails."""
    try:
        width, height = read_size(path)
        grey = Image.fromarray(read_image(path, min_side=4 * _THUMB)).convert("L")
        with open_image(path) as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()  # type: ignore[arg-type]
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(path, error.strerror or str(error))
    return Fingerprint(path, width, height, digest, grey.resize((_THUMB, _THUMB), Image.Resampling.BOX).tobytes())


def fingerprints(paths: Sequence[str], workers: int) -> Iterator[Fingerprint | ImageError]:
    """`fingerprint` of each path, in order, computed by ``workers`` processes (no new process if 1).

    Raises:
        UserError: a worker process was killed, for instance because memory ran out.
    """
    if workers == 1 or len(paths) < 64:
        yield from map(fingerprint, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        try:
            yield from pool.map(fingerprint, paths, chunksize=32)
        except BrokenProcessPool:
            raise UserError(
                "a process reading images was killed, likely for lack of memory: use fewer workers"
            ) from None


def equal_groups(prints: Sequence[Fingerprint]) -> list[list[int]]:
    """Indices of images whose files are the same byte for byte, in groups of two or more."""
    return _groups((index, print_.digest) for index, print_ in enumerate(prints))


def similar_groups(prints: Sequence[Fingerprint]) -> list[list[int]]:
    """Indices of images that look the same (saved again, resized, slightly brighter), in groups of two or more.

    Pictures with hardly any contrast are left out: they all look alike.
    """
    if not prints:
        return []
    thumbs = np.frombuffer(b"".join(p.thumb for p in prints), np.uint8).reshape(len(prints), -1)
    pictures, which = np.unique(thumbs, axis=0, return_inverse=True)
    values = pictures - pictures.mean(axis=1, keepdims=True, dtype=np.float32)
    usable = np.flatnonzero(values.std(axis=1) >= _MIN_CONTRAST)
    if not len(usable):
        return []
    # Vectors of length one: their product is the correlation, and it decides their distance.
    vectors = values[usable] / np.linalg.norm(values[usable], axis=1, keepdims=True)
    distance = np.sqrt(2 * (1 - MIN_CORRELATION))
    # Means over 4x4 pixels are a projection: no two pictures are further apart there than in full.
    cells = 4 * vectors.reshape(-1, _THUMB // 4, 4, _THUMB // 4, 4).mean(axis=(2, 4)).reshape(len(vectors), -1)
    # Only the nearest, as many pictures may be alike: the groups they are in are joined below.
    near = KDTree(cells).query(cells, _NEIGHBOURS, distance_upper_bound=distance)[1] if len(cells) else np.zeros((0, 1))
    a, place = np.nonzero(near < len(cells))
    b = near[a, place]
    close = np.linalg.norm(vectors[a] - vectors[b], axis=1) <= distance
    edges = coo_array((np.ones(close.sum(), bool), (a[close], b[close])), shape=(len(cells), len(cells)))
    group_of = dict(zip(usable.tolist(), connected_components(edges, directed=False)[1].tolist(), strict=True))
    return _groups((index, group_of[picture]) for index, picture in enumerate(which.tolist()) if picture in group_of)


def _groups(labels: Iterable[tuple[int, Hashable]]) -> list[list[int]]:
    """Indices that share a label, in groups of two or more."""
    groups: dict[Hashable, list[int]] = {}
    for index, label in labels:
        groups.setdefault(label, []).append(index)
    return [group for group in groups.values() if len(group) > 1]
