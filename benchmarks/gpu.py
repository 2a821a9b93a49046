"""Pre-training steps on a GPU, on a batch that is there already.

    python benchmarks/gpu.py [--cases conditional-detr ...] [--batch 64] [--rounds 10] [--variants plain bf16 compiled]
                             [--out benchmarks/results] [--device cuda] [--quick]

Ours in several precisions, and compiled, against the plain re-creation of the research code's structure (plain.py),
with inputs as in step.py. Prints Markdown and writes gpu.json. ``--device cpu --quick`` tries the program without a
GPU. The rate of a whole run stands in its log: ``seconds`` in OUT/log.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from step import CASES, Clock, Scale, make_inputs, make_pretext, make_step, set_dropout, to_device

VARIANTS = ("plain", "fp32", "bf16", "compiled")
"""``compiled``: in bf16."""


def resident_step(case: str, variant: str, scale: Scale, device: torch.device) -> Callable[[], Any]:
    """A step on one batch that stays on the device."""
    pretext = make_pretext(case, scale).to(device)
    set_dropout(pretext, 0.1)
    step = make_step("bf16" if variant == "compiled" else variant, pretext, Clock())
    if variant == "compiled":
        pretext.compile()
    inputs = to_device(make_inputs(scale), device)
    return lambda: step(inputs)


def measure(case: str, variant: str, scale: Scale, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds, images per second, peak memory, and how often the host waits for the device in a step."""
    gc.collect()
    cuda = device.type == "cuda"
    step = resident_step(case, variant, scale, device)
    for _ in range(3):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        step()
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
    return {
        "ms": {"median": statistics.median(taken), "min": min(taken), "max": max(taken)},
        "images/s": 1e3 * scale.batch / statistics.median(taken),
        "peak, GB": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "host waits": sum("synchronizing CUDA operation" in str(warning.message) for warning in record),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary in Markdown."""
    lines = [
        f"{summary['device']}, PyTorch {summary['torch']}, {summary['batch']} images a step:",
        "",
        "| step | ms [min-max] | images/s | plain / this | peak, GB | host waits |",
        "|---" * 6 + "|",
    ]
    for case, variants in summary["steps"].items():
        for variant, result in variants.items():
            ms, plain = result["ms"], variants.get("plain", result)["ms"]["median"]
            lines.append(
                f"| {case}, {variant} | {ms['median']:.1f} [{ms['min']:.1f}-{ms['max']:.1f}] "
                f"| {result['images/s']:.0f} | {plain / ms['median']:.2f} | {result['peak, GB'] or 0:.1f} "
                f"| {result['host waits']} |"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    device, out = torch.device(options.device), Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    scale = dataclasses.replace(Scale.quick() if options.quick else Scale(), batch=options.batch)
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "batch": options.batch,
        "steps": {},
    }
    for case in options.cases:
        for variant in options.variants:
            result = measure(case, variant, scale, 1 if options.quick else options.rounds, device)
            summary["steps"].setdefault(case, {})[variant] = result
            (out / "gpu.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    return summary


if __name__ == "__main__":
    main()
