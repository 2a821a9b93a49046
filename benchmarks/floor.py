"""How far a pre-training step is from what this machine could do at best.

    python benchmarks/floor.py [--cases conditional-detr ...] [--rounds 5] [--threads 2] [--out benchmarks/results]
                               [--quick]

The floor of a part of the step is its floating point operations, counted by PyTorch, over the rate of the machine's
large matrix products, or its least traffic over the bandwidth of a copy, whichever is more. Measured in the same run:
both rates, just before each detector, since what else runs on a machine changes them; the step's parts (inputs and
sizes as in step.py, fp32), and what a data worker takes per sample beside the bare decoding of its JPEG. Prints
Markdown and writes floor.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_path import BATCH, Rows, shipped_photos
from plain import stock_modules
from siamese_detr.kernels import deformable_attention, frozen, linear
from siamese_detr.runtime.hardware import emulates_bf16
from siamese_detr.runtime.memory import keep_memory
from siamese_detr.views import TwoViewDataset, ViewBatchSampler, ViewConfig
from step import CASES, Clock, Scale, make_inputs, make_pretext, make_step, to_device

ADAMW_BYTES = 7 * 4
"""Per parameter: weight, gradient and two averages read, all but the gradient written."""


def best(action: Callable[[], Any], rounds: int = 7) -> float:
    """Least wall seconds of an action, the first time not counted."""
    action()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine(side: int) -> dict[str, float]:
    """Operations per second of matrix products, by precision, but for bf16 where it is only emulated; bytes per second
    of a copy, read and written.
    """
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and emulates_bf16("cpu"):
            continue
        a, b = (torch.randn(side, side, dtype=dtype) for _ in range(2))
        ways: list[Callable[[], Any]] = [lambda a=a, b=b: a @ b]  # type: ignore[misc]
        if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # MKL is not the faster library on every processor
            ways.append(lambda a=a, b=b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))  # type: ignore[misc]
        found[f"{name}, flop/s"] = 2 * side**3 / min(map(best, ways))
    source = torch.ones(side * side * 16)
    target = torch.empty_like(source)
    found["copy, bytes/s"] = 2 * source.nbytes / best(lambda: target.copy_(source))
    return found


def operations(case: str, scale: Scale, device: torch.device | str = "cpu") -> dict[str, float]:
    """Floating point operations of a step's parts, and parameters that are trained."""
    inputs, pretext = to_device(make_inputs(scale), device), make_pretext(case, scale).to(device)
    # Stock modules: those of ours that call oneDNN are not counted, and what they compute twice should not be. But ours
    # for deformable attention, without which padding would be encoded.
    with (
        patch.object(frozen, "fuse", lambda network, side: network),
        stock_modules(pretext.detector),
        patch.object(linear, "prefers_onednn", lambda: False),
    ):
        deformable_attention.install(pretext.detector.model)
        with FlopCounterMode(display=False) as counted:
            features = pretext.frozen_features(inputs)
        found = {"backbone": counted.get_total_flops()}
        with FlopCounterMode(display=False) as counted:
            loss = pretext(features).loss
        found["Transformer, heads, losses"] = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        found["backward"] = counted.get_total_flops()
    found["trained parameters"] = sum(p.numel() for p in pretext.parameters() if p.requires_grad)
    return found


def measured(case: str, scale: Scale, rounds: int) -> dict[str, float]:
    """Median wall milliseconds of a step's parts in fp32."""
    clock, inputs = Clock(), make_inputs(scale)
    step = make_step("fp32", make_pretext(case, scale), clock)
    step(inputs)
    clock.take()
    taken = []
    for _ in range(rounds):
        step(inputs)
        taken.append(clock.take()[1])
    parts = {name: 1e3 * statistics.median(t[name] for t in taken) for name in taken[0]}
    return {
        "backbone": parts["backbone, views"] + parts["backbone, crops"],
        "Transformer, heads, losses": parts["Transformer"] + parts["heads, matching, losses"],
        "backward": parts["backward"],
        "clip, optimiser": parts["clip, optimiser"],
    }


def step_floor(case: str, scale: Scale, rounds: int, rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """Every part's operations, floor and measured time."""
    counted, taken = operations(case, scale), measured(case, scale, rounds)
    parameters = counted.pop("trained parameters")
    floors = {part: 1e3 * flops / rates["fp32, flop/s"] for part, flops in counted.items()}
    floors["clip, optimiser"] = 1e3 * parameters * ADAMW_BYTES / rates["copy, bytes/s"]
    counted["clip, optimiser"] = 0.0
    rows = {
        part: {"gflop": counted[part] / 1e9, "floor, ms": floors[part], "measured, ms": taken[part]} for part in taken
    }
    rows["whole step"] = {name: sum(row[name] for row in rows.values()) for name in rows["backbone"]}
    return rows


def worker_floor(count: int) -> dict[str, float]:
    """CPU milliseconds per sample in a data worker: bare decoding by libjpeg-turbo, and all of it."""
    with tempfile.TemporaryDirectory() as folder:
        paths = shipped_photos(Path(folder), count)
        store: Any = Rows(paths)
        dataset = TwoViewDataset(store, ViewConfig(), 0)
        batches = list(ViewBatchSampler(store, dataset.config, min(BATCH, count), max(1, count // BATCH), 0))
        keys = [key for batch in batches for key in batch]
        decode = best(lambda: [cv2.imread(str(paths[row])) for _, row in keys]) / len(keys)
        whole = best(lambda: [dataset[key] for key in keys]) / len(keys)
    return {"decode, ms": 1e3 * decode, "worker, ms": 1e3 * whole}


def tables(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = []
    for case, parts in summary["cases"].items():
        rates = summary["machine"][case]
        lines += [
            f"**{case}**, at {rates['fp32, flop/s'] / 1e9:.0f} GFLOP/s in fp32, "
            + (f"{rates['bf16, flop/s'] / 1e9:.0f} in bf16, " if "bf16, flop/s" in rates else "no bf16, ")
            + f"{rates['copy, bytes/s'] / 1e9:.0f} GB/s",
            "",
            "| part | GFLOP | floor, ms | measured, ms | floor / measured |",
            "|---" * 5 + "|",
        ]
        for part, row in parts.items():
            lines.append(
                f"| {part} | {row['gflop']:.1f} | {row['floor, ms']:.0f} | {row['measured, ms']:.0f} "
                f"| {row['floor, ms'] / row['measured, ms']:.2f} |"
            )
        lines.append("")
    worker = summary["worker"]
    lines.append(f"A data worker: {worker['worker, ms']:.1f} ms a sample, {worker['decode, ms']:.1f} of them decoding.")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_memory()  # as a training does
    scale, rounds = (Scale.quick(), 1) if options.quick else (Scale(), options.rounds)
    summary: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "machine": {},  # by case
        "cases": {},
    }
    for case in options.cases:
        rates = summary["machine"][case] = machine(256 if options.quick else 3072)
        summary["cases"][case] = step_floor(case, scale, rounds, rates)
    torch.set_num_threads(1)
    summary["worker"] = worker_floor(4 if options.quick else 48)
    print(tables(summary))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "floor.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    main()
