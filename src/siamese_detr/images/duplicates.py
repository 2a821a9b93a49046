"""Fingerprints of images, and finding those that are the same or nearly so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.decode import read_image, read_size
from siamese_detr.images.shards import is_plain_file, read_bytes

# Of 600 VOC photos saved again at two thirds of their size and JPEG quality 40, 99 % differ in at most 9 of the 128
# bits and all correlate above 0.98; among the 15 million pairs of 5,476 different photos none is within both bounds.
MAX_DISTANCE = 12
MIN_CORRELATION = 0.97
_THUMB = 16
_MIN_CONTRAST = 4.0
_NEIGHBOURS = 64


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What one decoded image looks like.

    Args:
        path: the file.
        width: pixels, upright.
        height: pixels, upright.
        digest: hash of the file's bytes.
        difference_hash: 16 bytes, whether each of 8x8 cells is brighter than its left and than its upper neighbour.
        thumb: 256 bytes, 16x16 grey values.
    """

    path: str
    width: int
    height: int
    digest: bytes
    difference_hash: bytes
    thumb: bytes


def fingerprint(path: str) -> Fingerprint | ImageError:
    """Decode an image (all of its data, at reduced scale where the format allows); the error, where that fails."""
    try:
        width, height = read_size(path)
        grey = Image.fromarray(read_image(path, min_side=4 * _THUMB)).convert("L")
        if is_plain_file(path):
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "blake2b").digest()[:16]
        else:
            digest = hashlib.blake2b(read_bytes(path)).digest()[:16]
    except ImageError as error:
        return error
    except OSError as error:
        return ImageError(path, error.strerror or str(error))
    cells = np.asarray(grey.resize((9, 9), Image.Resampling.BOX))
    rises = np.concatenate([cells[:8, 1:] > cells[:8, :-1], cells[1:, :8] > cells[:-1, :8]])
    thumb = grey.resize((_THUMB, _THUMB), Image.Resampling.BOX).tobytes()
    return Fingerprint(path, width, height, digest, np.packbits(rises).tobytes(), thumb)


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
    by_digest: dict[bytes, list[int]] = {}
    for index, print_ in enumerate(prints):
        by_digest.setdefault(print_.digest, []).append(index)
    return [group for group in by_digest.values() if len(group) > 1]


def similar_groups(prints: Sequence[Fingerprint]) -> list[list[int]]:
    """Indices of images that look the same (saved again, resized, slightly brighter), in groups of two or more.

    Candidates are neighbours after sorting by each of sixteen 16-bit parts of the hash, so the cost is linear but for
    sorting, and a pair that differs in every part is missed. Pictures with hardly any contrast are left out: they all
    look alike.
    """
    if len(prints) < 2:
        return []
    thumbs = np.frombuffer(b"".join(p.thumb for p in prints), np.uint8).reshape(len(prints), -1)
    deviation = thumbs.std(axis=1)
    usable = np.flatnonzero(deviation >= _MIN_CONTRAST)
    hashes = np.frombuffer(b"".join(p.difference_hash for p in prints), np.uint8).reshape(len(prints), 16)
    bits = np.unpackbits(hashes, axis=1)
    parts = [np.arange(16) + 16 * k for k in range(8)] + [np.arange(16) * 8 + k for k in range(8)]
    words = hashes.view(np.uint64)
    pairs = [np.zeros(0, dtype=np.int64)]
    for part in parts:
        keys = (bits[np.ix_(usable, part)].astype(np.int64) << np.arange(16)).sum(axis=1)
        order = usable[np.argsort(keys, kind="stable")]
        keys = np.sort(keys)
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            same = np.flatnonzero(keys[step:] == keys[:-step])
            if not len(same):
                break
            a, b = order[same], order[same + step]
            close = np.bitwise_count(words[a] ^ words[b]).sum(axis=1) <= MAX_DISTANCE
            pairs.append(np.minimum(a, b)[close] * len(prints) + np.maximum(a, b)[close])
    a, b = np.divmod(np.unique(np.concatenate(pairs)), len(prints))
    keep = _correlation(thumbs, deviation, a, b) >= MIN_CORRELATION
    return _components(a[keep], b[keep], len(prints))


def _correlation(thumbs: np.ndarray, deviation: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    result = np.empty(len(a))
    for start in range(0, len(a), 65536):  # bounds the memory
        part = slice(start, start + 65536)
        u, v = (thumbs[i[part]].astype(np.float32) for i in (a, b))
        u -= u.mean(axis=1, keepdims=True)
        v -= v.mean(axis=1, keepdims=True)
        result[part] = (u * v).mean(axis=1) / (deviation[a[part]] * deviation[b[part]])
    return result


def _components(a: np.ndarray, b: np.ndarray, count: int) -> list[list[int]]:
    _, component = connected_components(
        coo_array((np.ones(len(a), bool), (a, b)), shape=(count, count)), directed=False
    )
    groups: dict[int, list[int]] = {}
    for index in np.unique(np.concatenate([a, b])).tolist():
        groups.setdefault(int(component[index]), []).append(index)
    return list(groups.values())
