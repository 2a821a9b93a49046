"""The verb `propose`: images in, proposal store out, on all cores, continued where it was stopped."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace

import cv2
import pyarrow as pa

from siamese_detr.config import Options, check_numbers, verb, write_config
from siamese_detr.errors import ImageError, UserError
from siamese_detr.files import write_text
from siamese_detr.images.listing import ImageList, list_images
from siamese_detr.images.shards import location
from siamese_detr.messages import say
from siamese_detr.proposals.methods import Method, find_method, make_method
from siamese_detr.proposals.shard import StoredImage, StoreSettings
from siamese_detr.proposals.store import ProposalStore, part_name
from siamese_detr.proposals.worker import begin, compute
from siamese_detr.proposals.writer import StoreWriter, writing
from siamese_detr.runtime.cores import usable_cores
from siamese_detr.runtime.progress import ProgressBar

FAILURES = "failures.txt"
Value = int | float | bool | str | None
_CHUNK = 16  # images handed to a worker at a time
_BLOCK = 2**15  # images that are handed out before the next ones: their list is in memory
_SHOWN = 5  # failures shown on the screen; all are in the store and in failures.txt


@dataclass
class ProposeConfig(Options):
    """Compute class-agnostic boxes of images: those that the store does not know yet.

    Args:
        images: folder (searched recursively), list file (.txt) or COCO JSON.
        out: directory of the proposal store; an existing one is continued: only what is missing is computed.
        method: edge-boxes (the paper's), selective-search (DETReg's), random, or one that a plug-in adds.
        method_options: further options of the method by name: alpha of edge-boxes (smaller is faster), its edge_model
            (OpenCV's model.yml.gz), mode=full of selective-search.
        max_boxes: at most so many boxes per image are kept, best first.
        seed: of random boxes.
        workers: processes; 0 means one per core. The result does not depend on it.
        shard_size: most images per file of the store.
        flush_seconds: what has been computed is saved at least this often; a kill loses no more.
        retry_failed: try images again that could not be read before.
        part: for several machines: I/N computes the I-th of N parts (from 1/N to N/N) into a folder of its own inside
            OUT, which is the store once all N are there.
    """

    images: str
    out: str
    method: str = "edge-boxes"
    method_options: dict[str, Value] = field(default_factory=dict)
    max_boxes: int = 512
    seed: int = 0
    workers: int = 0
    shard_size: int = 4096
    flush_seconds: float = 30.0
    retry_failed: bool = False
    part: str | None = None

    def check(self) -> None:
        check_numbers(self, positive=("max_boxes", "shard_size"), not_negative=("workers", "seed"))

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        read = {option.name for option in fields(find_method(self.method))}
        yield tuple({"max_boxes", "seed"} - read), f"{self.method} does not read it"


@dataclass(frozen=True)
class ProposeReport:
    """What `propose` did.

    Attributes:
        store: directory of the store.
        images: how many images were asked for.
        computed: how many got their boxes in this run.
        kept: how many had been dealt with before (failures included).
        failures: path -> reason, of those of the images asked for that have no boxes, from this run and before.
        centred: images of this run without any boxes, given the centred one.
        notes: damaged shards that were dropped, folders that could not be listed.
    """

    store: str
    images: int
    computed: int
    kept: int
    failures: dict[str, str] = field(default_factory=dict)
    centred: int = 0
    notes: list[str] = field(default_factory=list)


@verb(ProposeConfig)
def propose(config: ProposeConfig) -> ProposeReport:
    """Compute the boxes of all images that the store does not know yet.

    Rows are added in the order of the sorted paths, whatever the number of workers.

    Returns:
        where the store is, and how many images have boxes in it.

    Raises:
        UserError: no images, none readable, settings that differ from the store's, a worker killed, a full disk.
    """
    method = make_method(config.method, {"max_boxes": config.max_boxes, "seed": config.seed}, config.method_options)
    images = list_images(config.images, without=config.out)
    if config.part is not None:
        config, images = _part(config, config.part, images)
    settings = StoreSettings(config.method, method.parameters(), location(images.root))
    with writing(config.out, settings, config.shard_size, config.flush_seconds, config.retry_failed) as writer:
        notes = [*images.problems, *writer.dropped]
        for note in notes[:_SHOWN]:
            say(f"note: {note}")
        store = writer.known
        try:
            write_config(config, store.directory / "propose.yaml")
        except OSError as error:
            raise UserError(
                f"cannot write to {store.directory}: {error.strerror}; free disk space or change permissions"
            ) from error
        paths = pa.array(store.relative_paths(images), pa.large_string())
        todo = paths.filter(pa.array((store.find(paths) < 0) & ~store.failed(paths)))
        computed, centred = _compute_all(config, store.settings.image_root, method, todo, writer)
    store = ProposalStore.open(config.out)
    asked = paths.filter(pa.array(store.failed(paths))).to_pylist()
    failures = {path: store.failures[path] for path in asked}
    with contextlib.suppress(OSError):
        lines = "".join(f"{path}\t{reason}\n" for path, reason in store.failures.items())
        write_text(store.directory / FAILURES, lines)
    if len(failures) == len(paths):
        path, reason = next(iter(failures.items()))
        raise UserError(
            f"{config.images}: none of its {len(paths)} images could be read, the first: {path} ({reason}); see "
            f"{store.directory / FAILURES}, fix them and run again (propose: with --retry-failed)"
        )
    kept = len(paths) - len(todo)
    report = ProposeReport(str(store.directory), len(paths), computed, kept, failures, centred, notes)
    _show(report)
    return report


def _part(config: ProposeConfig, text: str, images: ImageList) -> tuple[ProposeConfig, ImageList]:
    """One machine's share: an even piece of the sorted list, so that all together have the rows of one."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts) <= len(images)):
        raise UserError(f"part={text}: give I/N, as 1/4 to 4/4 (there are {len(images)} images)")
    index, count = int(part), int(parts)
    first, last = ((index + offset) * len(images) // count for offset in (-1, 0))
    out = os.path.join(config.out, part_name(index, count))
    return replace(config, out=out), replace(images, paths=images.paths[first:last])


def _compute_all(
    config: ProposeConfig, root: str, method: Method, todo: pa.Array, writer: StoreWriter
) -> tuple[int, int]:
    """Compute and store the boxes of images; how many got boxes, and how many of these the centred one."""
    if not len(todo):
        return 0, 0
    workers = min(config.workers or usable_cores(), -(-len(todo) // _CHUNK))
    computed = centred = 0
    title = f"{config.method}, {workers} process{'es' * (workers > 1)}"
    with ProgressBar(title, len(todo), unit="image") as progress:
        for done, result in enumerate(compute_in_order(root, method, todo, workers), 1):
            writer.add(result)
            if isinstance(result, StoredImage):
                computed += 1
                centred += not result.scores.any()
            progress.step(done)
    return computed, centred


def compute_in_order(root: str, method: Method, todo: pa.Array, workers: int) -> Iterator[StoredImage | ImageError]:
    """The boxes of images, in order, whatever order the workers finish in.

    Args:
        root: folder that the paths start from.
        method: what computes the boxes.
        todo: paths.
        workers: processes to start; below 2 it is done in this one.
    """
    one = functools.partial(compute, root, method)
    if workers < 2:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            for path in todo:
                yield one(path.as_py())
        finally:
            cv2.setNumThreads(threads)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin)
    done = 0
    try:
        for start in range(0, len(todo), _BLOCK):
            with _without_main():
                results = pool.map(one, todo[start : start + _BLOCK].to_pylist(), chunksize=_CHUNK)
            for result in results:
                yield result
                done += 1
    except BrokenProcessPool:
        raise UserError(
            f"a worker process died (killed, or out of memory?) at or after {os.path.join(root, todo[done].as_py())}; "
            "run the same command again to continue, with fewer workers if memory is short"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes started here from importing the user's script again, which may lack the ``__main__`` guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _show(report: ProposeReport) -> None:
    say(
        f"proposals of {report.images - len(report.failures)} of {report.images} images in {report.store} "
        f"({report.computed} computed now, {report.kept} there before)"
    )
    if report.centred:
        say(f"{report.centred} images without any edge got the centred box")
    if report.failures:
        say(f"{len(report.failures)} of them cannot be used, as listed in {report.store}/{FAILURES}:")
        for path, reason in list(report.failures.items())[:_SHOWN]:
            say(f"  {path}: {reason}")
