"""Proposals: recall and time against plain EdgeBoxes, scaling, and the memory of a large store.

    python benchmarks/proposals.py LABELS.json [--count 200] [--out benchmarks/results]
    python benchmarks/proposals.py --store-rows 10000000 [--scratch DIR]

The first form runs, image by image and in turn, our EdgeBoxes and the plain use of OpenCV's (its default parameters,
the best 512 boxes, thinned Sobel edges of the whole image) on labelled photos, both from the file to the boxes on one
thread, and compares recall and CPU time; then it times `propose` with one and two processes and with 1, 4 and 16 parts
of the images. The second form generates a store and measures what several processes reading it hold in memory. Both
print a table and write JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image
from rich.console import Console
from rich.table import Table

from siamese_detr.images import read_labels
from siamese_detr.proposals.methods import EdgeBoxes
from siamese_detr.proposals.propose import compute_in_order
from siamese_detr.proposals.shard import StoredImage, StoreSettings
from siamese_detr.proposals.store import ProposalStore
from siamese_detr.proposals.worker import compute
from siamese_detr.proposals.writer import writing
from siamese_detr.views.geometry import ious

BUDGETS = (30, 100, 512)
console = Console()


def plain_edge_boxes(path: Path) -> np.ndarray:
    """Boxes float64 (N, 4) xyxy, best first, as OpenCV gives them with nothing changed but the number kept."""
    image = np.asarray(Image.open(path).convert("RGB"))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    dx, dy = cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1)
    magnitude = np.hypot(dx, dy)
    magnitude /= max(float(magnitude.max()), 1e-6)
    angle = np.mod(np.arctan2(dy, dx), np.pi)
    sector = np.round(angle / (np.pi / 4)).astype(int) % 4
    padded = np.pad(magnitude, 1)
    height, width = magnitude.shape
    keep = np.zeros(magnitude.shape, bool)
    for number, (down, right) in enumerate([(0, 1), (1, 1), (1, 0), (1, -1)]):
        ahead = padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]
        behind = padded[1 - down : 1 - down + height, 1 - right : 1 - right + width]
        keep |= (sector == number) & (magnitude >= ahead) & (magnitude >= behind)
    thin = np.where(keep, magnitude, 0).astype(np.float32)
    found, _ = cv2.ximgproc.createEdgeBoxes(maxBoxes=max(BUDGETS)).getBoundingBoxes(thin, angle.astype(np.float32))
    xywh = np.asarray(found, np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


@dataclass
class Measured:
    """Per image: CPU seconds, and each object's best IoU within each budget of boxes."""

    seconds: list[float] = field(default_factory=list)
    best: list[np.ndarray] = field(default_factory=list)

    def add(self, seconds: float, objects: np.ndarray, boxes: np.ndarray) -> None:
        iou = np.stack([ious(boxes, box) for box in objects])
        self.seconds.append(seconds)
        self.best.append(np.stack([iou[:, :budget].max(1, initial=0) for budget in BUDGETS], 1))

    def recall(self, threshold: float, images: np.ndarray | None = None) -> list[float]:
        chosen = self.best if images is None else [self.best[i] for i in images]
        return [float(value) for value in (np.concatenate(chosen) >= threshold).mean(0)]


def compare(labels: str, count: int) -> dict:
    dataset = read_labels(labels)
    usable = [image for image in dataset.images if (~image.crowd).any()]
    order = np.random.default_rng(0).permutation(len(usable))[:count]
    plain, ours = Measured(), Measured()
    cv2.setNumThreads(1)
    for turn, index in enumerate(order):
        image = usable[index]
        objects = image.boxes[~image.crowd].astype(np.float64)
        for which in ("plain", "ours") if turn % 2 else ("ours", "plain"):
            start = time.process_time()
            if which == "plain":
                boxes = plain_edge_boxes(image.path)
            else:
                result = compute(str(image.path.parent), EdgeBoxes(), image.path.name)
                assert isinstance(result, StoredImage), result
                boxes = result.boxes
            seconds = time.process_time() - start
            (plain if which == "plain" else ours).add(seconds, objects, boxes)
    generator = np.random.default_rng(1)
    draws = [generator.integers(0, len(order), len(order)) for _ in range(1000)]
    seconds = np.array([plain.seconds, ours.seconds])
    ratios = seconds[0] / seconds[1]
    summary: dict = {"images": len(order), "objects": sum(map(len, plain.best))}
    for name, measured in (("plain", plain), ("ours", ours)):
        milliseconds = 1000 * np.array(measured.seconds)
        summary[name] = {
            "ms_per_image": {
                "median": float(np.median(milliseconds)),
                "mean": float(milliseconds.mean()),
                "p10_p90": np.percentile(milliseconds, [10, 90]).tolist(),
            },
            "recall_iou_0.5": dict(zip(map(str, BUDGETS), measured.recall(0.5), strict=True)),
            "recall_iou_0.7": dict(zip(map(str, BUDGETS), measured.recall(0.7), strict=True)),
        }
    summary["speed_ratio"] = {
        "of_totals": float(seconds[0].sum() / seconds[1].sum()),
        "ci95": np.percentile([seconds[0, d].sum() / seconds[1, d].sum() for d in draws], [2.5, 97.5]).tolist(),
        "per_image_median": float(np.median(ratios)),
        "per_image_p10_p90": np.percentile(ratios, [10, 90]).tolist(),
    }
    gains = np.array([np.subtract(ours.recall(0.5, d), plain.recall(0.5, d)) for d in draws[:300]])
    summary["recall_gain_iou_0.5"] = {
        str(budget): {
            "mean": summary["ours"]["recall_iou_0.5"][str(budget)] - summary["plain"]["recall_iou_0.5"][str(budget)],
            "ci95": np.percentile(gains[:, column], [2.5, 97.5]).tolist(),
        }
        for column, budget in enumerate(BUDGETS)
    }
    return summary


def scaling(labels: str, photos: int, repeats: int) -> dict:
    """Images per second by number of processes and of images, start-up of the processes left out."""
    dataset = read_labels(labels)
    paths = [image.path for image in dataset.images[:photos]]
    names = pa.array([path.name for path in paths])

    def seconds(part: pa.Array, workers: int) -> float:
        # The pool's first outcomes wait for the processes to start; the clock starts behind one round of chunks.
        warm_up = pa.concat_arrays([names[:16]] * workers)
        outcomes = compute_in_order(str(paths[0].parent), EdgeBoxes(), pa.concat_arrays([warm_up, part]), workers)
        for _ in range(len(warm_up)):
            next(outcomes)
        start = time.perf_counter()
        done = sum(1 for _ in outcomes)
        assert done == len(part)
        return time.perf_counter() - start

    parts = {str(len(names) // divisor): names[: len(names) // divisor] for divisor in (16, 4, 1)}
    rates: dict[int, list[float]] = {1: [], 2: []}
    costs: dict[str, list[float]] = {count: [] for count in parts}
    for _ in range(repeats):  # in turn, so that other work on the machine falls on all alike
        for workers in rates:
            rates[workers].append(len(names) / seconds(names, workers))
        for count, part in parts.items():
            costs[count].append(1000 * seconds(part, 1) / len(part))
    return {
        "images_per_second": {str(w): {"median": float(np.median(r)), "all": r} for w, r in rates.items()},
        "speed_up_of_two": float(np.median(rates[2]) / np.median(rates[1])),
        "ms_per_image_by_number_of_images": {count: float(np.median(cost)) for count, cost in costs.items()},
        "load_average_before": os.getloadavg()[0],
    }


def store_memory(rows: int, directory: Path, readers: int = 4, reads: int = 20_000) -> dict:
    boxes, scores = np.tile(np.float32([10, 20, 200, 180]), (4, 1)), np.linspace(1, 0.1, 4, dtype=np.float32)
    settings = StoreSettings("edge-boxes", {"max_boxes": 4}, "/data/images")
    start = time.perf_counter()
    with writing(directory, settings) as writer:
        for number in range(rows):
            path = f"train/n{number // 1300:08d}/n{number // 1300:08d}_{number:09d}.jpg"
            writer.add(StoredImage(path, 500, 375 + number % 100, boxes, scores))
    written = time.perf_counter() - start
    size = sum(file.stat().st_size for file in directory.iterdir())
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(readers), context.Queue()
    processes = [
        context.Process(target=_read_randomly, args=(directory, number, reads, barrier, results))
        for number in range(readers)
    ]
    for process in processes:
        process.start()
    figures = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {
        "rows": rows,
        "gigabytes_on_disk": size / 1e9,
        "write_seconds": written,
        "readers": readers,
        "rows_read_by_each": reads,
        "open_seconds": float(np.median([figure["open"] for figure in figures])),
        "all_sizes_seconds": float(np.median([figure["sizes"] for figure in figures])),
        "microseconds_per_random_row": float(np.median([figure["row"] for figure in figures])) * 1e6,
        "rss_megabytes_of_all_before_opening": sum(figure["rss_before"] for figure in figures),
        "rss_megabytes_of_all": sum(figure["rss"] for figure in figures),
        "pss_megabytes_of_all": sum(figure["pss"] for figure in figures),
    }


def _read_randomly(directory: Path, seed: int, reads: int, barrier, results) -> None:
    before = _memory("Rss")
    start = time.perf_counter()
    store = ProposalStore.open(directory)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    total = int(store.sizes()[:, 1].sum())
    sized = time.perf_counter() - start
    assert total > 0
    start = time.perf_counter()
    for index in np.random.default_rng(seed).integers(0, len(store), reads):
        store.row(int(index))
    row = (time.perf_counter() - start) / reads
    barrier.wait()
    figures = {"rss_before": before, "rss": _memory("Rss"), "pss": _memory("Pss")}
    barrier.wait()
    results.put(figures | {"open": opened, "sizes": sized, "row": row})


def _memory(kind: str) -> float:
    """Megabytes this process holds; shared pages count fully (Rss) or by their share (Pss)."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(kind)


def show(summary: dict) -> None:
    if "compare" in summary:
        figures = summary["compare"]
        table = Table(title=f"EdgeBoxes, {figures['images']} photos, {figures['objects']} objects, one core")
        for heading in ("", "ms per image (p10-p90)", *(f"recall@{budget}" for budget in BUDGETS), "@100, IoU 0.7"):
            table.add_column(heading)
        for name in ("plain", "ours"):
            row = figures[name]
            low, high = row["ms_per_image"]["p10_p90"]
            table.add_row(
                name,
                f"{row['ms_per_image']['median']:.1f} ({low:.1f}-{high:.1f})",
                *(f"{100 * value:.1f} %" for value in row["recall_iou_0.5"].values()),
                f"{100 * row['recall_iou_0.7']['100']:.1f} %",
            )
        console.print(table)
        ratio = figures["speed_ratio"]
        console.print(f"speed ratio {ratio['of_totals']:.1f} (95 %: {ratio['ci95'][0]:.1f}-{ratio['ci95'][1]:.1f})")
    for part in ("scaling", "store"):
        if part in summary:
            console.print_json(data=summary[part])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", nargs="?", help="COCO JSON of labelled photos")
    parser.add_argument("--count", type=int, default=200, help="photos to compare on")
    parser.add_argument("--scaling-count", type=int, default=320, help="photos for the timing of processes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--store-rows", type=int, default=0, help="measure a generated store of so many rows")
    parser.add_argument("--scratch", help="where to generate it (deleted afterwards)")
    parser.add_argument("--out", default="benchmarks/results", help="directory for the JSON")
    options = parser.parse_args()
    if not options.labels and not options.store_rows:
        parser.error("give LABELS.json or --store-rows")
    summary: dict = {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "cv2": cv2.__version__,
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    def finish(part: str, figures: dict) -> None:
        summary[part] = figures
        show({part: figures})
        file = out / ("proposals.json" if options.labels else "proposal-store.json")
        file.write_text(json.dumps(summary, indent=2) + "\n")
        console.print(f"written to {file}")

    if options.labels:
        finish("compare", compare(options.labels, options.count))
        finish("scaling", scaling(options.labels, options.scaling_count, options.repeats))
    if options.store_rows:
        directory = Path(tempfile.mkdtemp(dir=options.scratch))
        try:
            finish("store", store_memory(options.store_rows, directory))
        finally:
            shutil.rmtree(directory)


if __name__ == "__main__":
    main()
