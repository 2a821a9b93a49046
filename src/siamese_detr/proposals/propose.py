"""The verb `propose`: images in, proposal store out, on all cores, continued where it was stopped."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import types
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from typing import Literal

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from siamese_detr.config import check_numbers, verb, write_config
from siamese_detr.errors import UserError
from siamese_detr.files import write_text
from siamese_detr.images.listing import ImageList, list_images
from siamese_detr.images.shards import location
from siamese_detr.proposals.methods import Method
from siamese_detr.proposals.registry import find_method, make_method
from siamese_detr.proposals.shard import Failure, Row
from siamese_detr.proposals.store import ProposalStore, StoreSettings, part_name
from siamese_detr.proposals.worker import Job, Outcome, begin, compute
from siamese_detr.proposals.writer import StoreWriter
from siamese_detr.runtime.cores import usable_cores

FAILURES = "failures.txt"
_CHUNK = 16  # images handed to a worker at a time
Value = int | float | bool | str | None
_SHARED = ("max_boxes", "mode", "edge_model", "seed")  # options of methods that are options of the verb
_SHOWN = 5  # failures shown on the screen; all are in the store and in failures.txt


@dataclass
class ProposeConfig:
    """Compute class-agnostic boxes of images: those that the store does not know yet.

    Args:
        images: folder (searched recursively), list file (.txt) or COCO JSON.
        out: directory of the proposal store; an existing one is continued: only what is missing is computed.
        method: edge-boxes (the paper's), selective-search (DETReg's), random, or one that a plug-in adds.
        method_options: further options of the method by name, such as alpha of edge-boxes (smaller is faster).
        max_boxes: at most so many boxes per image are kept, best first.
        mode: of selective-search: fast (image shrunk to 128x128, as DETReg does) or full.
        edge_model: path of OpenCV's structured-forest edge model (model.yml.gz) for edge-boxes; built-in gradient edges
            if left out.
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
    mode: Literal["fast", "full"] = "fast"
    edge_model: str | None = None
    seed: int = 0
    workers: int = 0
    shard_size: int = 4096
    flush_seconds: float = 30.0
    retry_failed: bool = False
    part: str | None = None


@dataclass(frozen=True)
class ProposeReport:
    """What `propose` did.

    Attributes:
        store: directory of the store.
        images: how many images were asked for.
        computed: how many got their boxes in this run.
        kept: how many had been dealt with before (failures included).
        failures: those of the images asked for that have no boxes, from this run and before.
        centred: images of this run without any boxes, given the centred one.
        notes: damaged shards that were dropped, folders that could not be listed.
    """

    store: str
    images: int
    computed: int
    kept: int
    failures: list[Failure] = field(default_factory=list)
    centred: int = 0
    notes: list[str] = field(default_factory=list)


@verb(ProposeConfig)
def propose(config: ProposeConfig) -> ProposeReport:
    """Compute the boxes of all images that the store does not know yet.

    Rows are added in the order of the sorted paths, whatever the number of workers.

    Raises:
        UserError: no images, none readable, settings that differ from the store's, a worker killed, a full disk.
    """
    method = _method(config)
    images = list_images(config.images)
    if config.part is not None:
        config, images = _part(config, config.part, images)
    console = Console(stderr=True)
    with StoreWriter(
        config.out,
        StoreSettings(config.method, method.parameters(), location(images.root)),
        config.shard_size,
        config.flush_seconds,
    ) as writer:
        notes = [*images.problems, *writer.dropped]
        if config.mode != ProposeConfig.mode and "mode" not in _options(config):
            notes.append(f"mode has no effect on {config.method}")
        for note in notes[:_SHOWN]:
            console.print(f"note: {note}", style="yellow", markup=False, highlight=False)
        if config.retry_failed:
            writer.forget_failures()
        store = writer.known()
        try:
            write_config(config, store.directory / "propose.yaml")
        except OSError as error:
            raise UserError(
                f"cannot write to {store.directory}: {error.strerror}; free space or permissions"
            ) from error
        paths = pa.array(store.relative_paths(images), pa.large_string())
        todo = paths.filter(pa.array((store.find(paths) < 0) & ~store.failed(paths)))
        job = Job(store.settings.image_root, method)
        computed, centred = _compute_all(config, job, todo, writer, console)
    store = ProposalStore.open(config.out)
    failures = _failures_among(store, paths)
    _list_failures(store)
    report = ProposeReport(
        store=str(store.directory),
        images=len(paths),
        computed=computed,
        kept=len(paths) - len(todo),
        failures=failures,
        centred=centred,
        notes=notes,
    )
    if len(failures) == len(paths):
        raise UserError(
            f"{config.images}: none of its {len(paths)} images could be read, the first: {failures[0].path} "
            f"({failures[0].reason}); see {store.directory / FAILURES}, fix them and run again "
            "(propose: with --retry-failed)"
        )
    _show(report, console)
    return report


def _method(config: ProposeConfig) -> Method:
    check_numbers(config, positive=("max_boxes", "shard_size"), not_negative=("workers", "seed"))
    if config.edge_model is not None and "edge_model" not in _options(config):
        raise UserError(f"edge_model is for edge-boxes, not for {config.method}; leave it out")
    return make_method(config.method, {name: getattr(config, name) for name in _SHARED}, config.method_options)


def _options(config: ProposeConfig) -> set[str]:
    return {option.name for option in fields(find_method(config.method))}


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
    config: ProposeConfig, job: Job, todo: pa.Array, writer: StoreWriter, console: Console
) -> tuple[int, int]:
    """Compute and store the boxes of images; how many got boxes, and how many of these the centred one."""
    if not len(todo):
        return 0, 0
    workers = min(config.workers or usable_cores(), -(-len(todo) // _CHUNK))
    computed = centred = failed = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(
            f"{config.method}, {workers} process{'es' * (workers > 1)}", total=len(todo), failed=""
        )
        outcomes = _in_process(job, todo) if workers == 1 else _in_pool(job, todo, workers)
        for outcome in outcomes:
            if isinstance(outcome.result, Row):
                computed += 1
                centred += outcome.centred
                writer.add(outcome.result)
            else:
                failed += 1
                writer.add_failure(outcome.result.path, outcome.result.reason)
            progress.update(task, advance=1, failed=f"{failed} unreadable" if failed else "")
    return computed, centred


def _in_process(job: Job, todo: pa.Array) -> Iterator[Outcome]:
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        for chunk in _chunks(todo):
            yield from compute(job, chunk)
    finally:
        cv2.setNumThreads(threads)


def _in_pool(job: Job, todo: pa.Array, workers: int) -> Iterator[Outcome]:
    """In order, whatever order the workers finish in, with a bounded number of chunks under way."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=begin)
    pending: deque[tuple[Sequence[str], Future[list[Outcome]]]] = deque()
    chunks = _chunks(todo)
    current: Sequence[str] = [""]
    try:
        while True:
            for new in itertools.islice(chunks, 4 * workers - len(pending)):
                with _without_main():
                    pending.append((new, pool.submit(compute, job, new)))
            if not pending:
                return
            current, future = pending.popleft()
            yield from future.result()
    except BrokenProcessPool:
        raise UserError(
            f"a worker process died (killed, or out of memory?) at or after {os.path.join(job.root, current[0])}; "
            "run the same command again to continue, with fewer workers if memory is short"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _chunks(todo: pa.Array) -> Iterator[list[str]]:
    for start in range(0, len(todo), _CHUNK):
        yield todo[start : start + _CHUNK].to_pylist()


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes started here from importing the user's script again, which may lack the ``__main__`` guard."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _failures_among(store: ProposalStore, paths: pa.Array) -> list[Failure]:
    asked = pc.is_in(
        pa.array([failure.path for failure in store.failures], pa.large_string()),
        value_set=paths.cast(pa.large_string()),
    )
    return [failure for failure, wanted in zip(store.failures, np.asarray(asked), strict=True) if wanted]


def _list_failures(store: ProposalStore) -> None:
    """All failures of the store as a text file, a path and a reason per line."""
    with contextlib.suppress(OSError):
        lines = "".join(f"{failure.path}\t{failure.reason}\n" for failure in store.failures)
        write_text(store.directory / FAILURES, lines)


def _show(report: ProposeReport, console: Console) -> None:
    def line(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    line(
        f"proposals of {report.images - len(report.failures)} of {report.images} images in {report.store} "
        f"({report.computed} computed now, {report.kept} there before)"
    )
    if report.centred:
        line(f"{report.centred} images without any edge got the centred box", "yellow")
    if report.failures:
        line(f"{len(report.failures)} of them cannot be used, as listed in {report.store}/{FAILURES}:", "yellow")
        for failure in report.failures[:_SHOWN]:
            line(f"  {failure.path}: {failure.reason}", "yellow")
