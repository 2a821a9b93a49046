"""Pre-training on a GPU: steps on a batch that is there already, and runs of the command on JPEGs.

    python benchmarks/gpu.py [--cases conditional-detr ...] [--batch 64] [--rounds 10] [--variants plain bf16 ...]
                             [--run-batch 256] [--run-steps 80] [--workers 15] [--out benchmarks/results] [--quick]

Steps: ours in several precisions, and compiled, against the plain re-creation of the research code's structure
(plain.py), inputs as in step.py. The share of the machine's rate is the step's floating point operations, counted by
PyTorch, over its time and the rate of large bf16 matrix products measured just before.

Runs: `pretrain` with ResNet-50 and the paper's views and crops, from JPEGs of 500x375. Of the second half of the steps:
images per second, the share of the time in which the GPU did anything (by its own counter) and that in which training
waited for data (the GPU may still have had work then), where the host waited for the device, and how long the
paper's recipe would take.

Prints Markdown and writes gpu.json. ``--device cpu --quick`` tries the program without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from data_path import shipped_photos
from floor import operations
from siamese_detr.training.loop import Loop
from siamese_detr.training.pretrain import PretrainConfig, pretrain
from step import CASES, Clock, Scale, make_inputs, make_pretext, make_step, set_dropout, spread, to_device

VARIANTS = ("plain", "fp32", "bf16", "compiled")
"""``compiled``: in bf16."""
RECIPE_IMAGES = 300_000 * 256
"""Images that pass in the paper's recipe: updates times batch."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], Any], device: torch.device, rounds: int, warm_up: int = 3) -> list[float]:
    """Wall seconds of an action, each time to the end of what it started on the device."""
    taken = []
    for n in range(warm_up + rounds):
        synchronize(device)
        start = time.perf_counter()
        action()
        synchronize(device)
        if n >= warm_up:
            taken.append(time.perf_counter() - start)
    return taken


def machine(device: torch.device, quick: bool) -> dict[str, float]:
    """Operations per second of bf16 and fp32 matrix products; bytes per second of a copy, read and written."""
    side, found = 256 if quick else 8192, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        found[f"{name}, flop/s"] = 2 * side**3 / min(seconds(lambda a=a, b=b: a @ b, device, 10))  # type: ignore[misc]
    source = torch.ones(side * side * 8, device=device)
    target = torch.empty_like(source)
    found["copy, bytes/s"] = 2 * source.nbytes / min(seconds(lambda: target.copy_(source), device, 10))
    return found


class Waits:
    """Where the host waits for the device while this is entered, (file, line) -> times: PyTorch warns of it, but where
    an event is waited for.
    """

    def __enter__(self) -> Waits:
        self._warnings = warnings.catch_warnings(record=True)
        self._record = self._warnings.__enter__()
        warnings.simplefilter("always")
        stock, self._places = torch.cuda.Event.synchronize, Counter[str]()

        def counted(event: torch.cuda.Event) -> None:
            caller = sys._getframe(1)
            self._places[f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}"] += 1
            stock(event)

        self._events = patch.object(torch.cuda.Event, "synchronize", counted)
        self._events.start()
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(self, *args: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
        self._events.stop()
        self._warnings.__exit__(*args)
        found = [w for w in self._record or () if "synchronizing CUDA operation" in str(w.message)]
        self.places = self._places + Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)


def resident_step(case: str, variant: str, scale: Scale, device: torch.device) -> Callable[[], Any]:
    """A step on one batch that stays on the device."""
    pretext = make_pretext(case, scale).to(device)
    set_dropout(pretext, 0.1)
    step = make_step("bf16" if variant == "compiled" else variant, pretext, Clock())
    if variant == "compiled":
        pretext.compile()
    inputs = to_device(make_inputs(scale), device)
    return lambda: step(inputs)


def measure_steps(case: str, variant: str, scale: Scale, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds, images per second, peak memory, and waits of one step."""
    gc.collect()
    step = resident_step(case, variant, scale, device)
    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, device, rounds)
    with Waits() as waits:
        step()
    found: dict[str, Any] = {
        "ms": spread([1e3 * value for value in taken]),
        "images/s": scale.batch / statistics.median(taken),
        "host waits": waits.places,
    }
    if device.type == "cuda":
        found["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return found


class Meter:
    """Times the second half of a run: in the first, buffers are still being allocated for batches of new sizes.

    Args:
        steps: of the run.
        device: it runs on.
    """

    def __init__(self, steps: int, device: torch.device) -> None:
        self.first, self.last, self.device = steps // 2, steps, device
        self.waited = self.seconds = 0.0
        self.measuring = False
        self.waits = Waits()
        self.busy: list[int] = []

    def watch(self) -> None:
        """Note ten times a second in how much of the last moments the GPU did anything, by its own counter."""
        with contextlib.suppress(ModuleNotFoundError):  # nvidia-ml-py
            while self.measuring:
                self.busy.append(torch.cuda.utilization())
                time.sleep(0.1)

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Time how long the next batch is waited for."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.waited += (time.perf_counter() - start) * self.measuring
            yield batch

    def step_done(self, step: int) -> None:
        """Called after each update."""
        if step == self.first:
            synchronize(self.device)
            self.measuring, self.seconds = True, -time.perf_counter()
            self.waits.__enter__()
            if self.device.type == "cuda":
                threading.Thread(target=self.watch, daemon=True).start()
        elif step == self.last:
            self.waits.__exit__(None, None, None)
            synchronize(self.device)
            self.seconds += time.perf_counter()
            self.measuring = False


def measure_run(case: str, photos: Path, options: argparse.Namespace, device: torch.device, compiled: bool) -> dict:
    """A run of the command."""
    family, sizes = CASES[case]
    detector_options = {name: value for name, value in sizes.items() if name != "num_queries"}
    meter = Meter(options.run_steps, device)
    batches, step_done = Loop.batches, Loop._step_done

    def metered(loop: Loop, *arguments: Any) -> None:
        meter.step_done(loop.state.step)
        step_done(loop, *arguments)

    small = dict(short_sides=[96], max_size=128, crop_size=64, hidden_size=32, heads=4, ffn_size=64)
    with (
        tempfile.TemporaryDirectory() as out,
        patch.object(Loop, "_step_done", metered),
        patch.object(Loop, "batches", lambda loop, start: meter.waiting(batches(loop, start))),
    ):
        pretrain(
            PretrainConfig(
                images=str(photos),
                out=out,
                proposal_method="random",
                detector=family,
                detector_options=detector_options,
                num_queries=sizes["num_queries"],
                backbone="random:resnet50" if not options.quick else "random:resnet18",
                batch_size=options.run_batch,
                steps=options.run_steps,
                workers=options.workers,
                precision="bf16",
                compile=compiled,
                device="auto" if device.type == "cuda" else "cpu",
                log_every=10 * options.run_steps,
                save_every=10 * options.run_steps,
                progress=False,
                **(small if options.quick else {}),
            )
        )
    steps = meter.last - meter.first
    rate = steps * options.run_batch / meter.seconds
    return {
        "images/s": rate,
        "GPU busy": statistics.mean(meter.busy) / 100 if meter.busy else None,
        "waited for data": meter.waited / meter.seconds,
        "host waits per step": {place: times / steps for place, times in meter.waits.places.most_common(8)},
        "recipe, hours": RECIPE_IMAGES / rate / 3600,
    }


def tables(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    rates = summary["machine"]
    lines = [
        f"{summary['device']}, PyTorch {summary['torch']}: {rates['bf16, flop/s'] / 1e12:.0f} TFLOP/s in bf16, "
        f"{rates['fp32, flop/s'] / 1e12:.0f} in fp32, {rates['copy, bytes/s'] / 1e9:.0f} GB/s.",
        "",
        f"| step of {summary['batch']} images | ms [min-max] | images/s | plain / this | share of bf16 rate | peak, GB "
        "| host waits |",
        "|---" * 7 + "|",
    ]
    for case, variants in summary["steps"].items():
        for variant, found in variants.items():
            ms, plain = found["ms"], variants.get("plain", found)["ms"]["median"]
            rate = found["images/s"] * summary["flop per image"][case]
            lines.append(
                f"| {case}, {variant} | {ms['median']:.1f} [{ms['min']:.1f}-{ms['max']:.1f}] | {found['images/s']:.0f} "
                f"| {plain / ms['median']:.2f} | {100 * rate / rates['bf16, flop/s']:.1f} % "
                f"| {found.get('peak, GB', 0):.1f} | {sum(found['host waits'].values())} |"
            )
    lines += [
        "",
        f"| run, batch {summary['run batch']}, {summary['workers']} workers | images/s | share of bf16 rate "
        "| GPU busy | waited for data | host waits per step | recipe, hours |",
        "|---" * 7 + "|",
    ]
    for name, found in summary["runs"].items():
        share = found["images/s"] * summary["flop per image"][name.split(",")[0]] / rates["bf16, flop/s"]
        lines.append(
            f"| {name} | {found['images/s']:.0f} | {100 * share:.1f} % | {100 * (found['GPU busy'] or 0):.0f} % "
            f"| {100 * found['waited for data']:.1f} % "
            f"| {sum(found['host waits per step'].values()):.2f} | {found['recipe, hours']:.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", nargs="*", choices=CASES, help="cases that are run (default: CASES)")
    parser.add_argument("--run-variants", nargs="+", choices=("bf16", "compiled"), default=["bf16", "compiled"])
    parser.add_argument("--run-batch", type=int, default=256)
    parser.add_argument("--run-steps", type=int, default=80)
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--photos", type=int, default=8192, help="JPEGs for the runs, 256 of them different")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    scale = dataclasses.replace(Scale.quick() if options.quick else Scale(), batch=options.batch)
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "batch": options.batch,
        "run batch": options.run_batch,
        "workers": options.workers,
        "machine": machine(device, options.quick),
        "flop per image": {},
        "steps": {},
        "runs": {},
    }
    runs = options.cases if options.runs is None else options.runs
    for case in dict.fromkeys([*options.cases, *runs]):
        counted = operations(case, dataclasses.replace(scale, batch=2), device)
        counted.pop("trained parameters")
        summary["flop per image"][case] = sum(counted.values()) / 2
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    def keep(table: dict[str, Any], name: str, found: dict[str, Any]) -> None:
        table[name] = found
        print(f"{name}: {found}", flush=True)
        (out / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n")

    for case in options.cases:
        for variant in options.variants:
            found = measure_steps(case, variant, scale, 1 if options.quick else options.rounds, device)
            keep(summary["steps"].setdefault(case, {}), variant, found)
    with tempfile.TemporaryDirectory() as photos:
        if runs:
            made = shipped_photos(Path(photos), min(256, options.photos))
            for n in range(len(made), options.photos):
                os.link(made[n % len(made)], Path(photos) / f"{n}-again.jpg")
        for case in runs:
            for variant in options.run_variants:
                found = measure_run(case, Path(photos), options, device, variant == "compiled")
                keep(summary["runs"], f"{case}, {variant}", found)
    print(tables(summary))
    return summary


if __name__ == "__main__":
    main()
