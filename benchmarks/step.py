"""One pre-training step, ours against a plain re-creation of the research code's structure (see plain.py).

    python benchmarks/step.py [--cases conditional-detr ...] [--rounds 5] [--threads 2] [--dropout 0.1]
                              [--pool-padding] [--out benchmarks/results] [--quick]

Both take the same weights and the same inputs: views of 380x460 pixels and 2x10 crops of 128 for each of 2 images,
ResNet-50. First their losses are compared without dropout: the program fails if they differ by more than 1e-4. Then
steps are timed in turn, so that other load on the machine meets both, but in processes of their own, since what a
process allocated before has a share in how fast it allocates. The CPU time (user + system, all threads) is given beside
the wall time because it hardly depends on that load. Prints Markdown tables and writes step.json and step.md.
``--quick``: tiny sizes, a check that all of it runs. Needs Linux, for the peak memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import platform
import resource
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from plain import PlainSiamese
from siamese_detr.detectors import build_detector
from siamese_detr.kernels import accelerate
from siamese_detr.kernels.frozen import is_norm
from siamese_detr.pretext import SiameseConfig
from siamese_detr.pretext.heads import BatchNorm
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.runtime.hardware import emulates_bf16
from siamese_detr.training.optimizer import adamw
from siamese_detr.views.batch import ViewInputs

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "conditional-detr": ("conditional-detr", {"num_queries": 100}),
    "detr": ("detr", {"num_queries": 100}),
    "deformable-single-scale": ("deformable-detr", {"num_queries": 300, "num_feature_levels": 1}),
    "deformable-multi-scale": ("deformable-detr", {"num_queries": 300, "num_feature_levels": 4}),
}
PARTS = ("backbone, views", "backbone, crops", "Transformer", "heads, matching, losses", "backward", "clip, optimiser")
TOLERANCE = 1e-4
EPSILON = 0.1
CLIP = 0.1


@dataclass(frozen=True)
class Scale:
    """Sizes of a benchmark; ``quick`` is for a test that it runs."""

    backbone: str = "random:resnet50"
    height: int = 380
    width: int = 460
    crop: int = 128
    batch: int = 2
    regions: int = 10
    pool_padding: bool = False
    sizes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def quick(cls) -> Scale:
        """Seconds instead of minutes."""
        sizes = {"hidden_size": 32, "heads": 4, "encoder_layers": 2, "decoder_layers": 2, "ffn_size": 64}
        return cls("random:resnet18", 96, 128, 64, 2, 5, sizes=sizes | {"num_queries": 20})


def make_pretext(case: str, scale: Scale) -> SiamesePretext:
    """The paper's pretext with seeded weights and without dropout.

    Batch norm over two images enlarges rounding errors a thousandfold in channels where the two agree by chance: its
    epsilon is larger here, so that losses tell whether the mathematics is the same.
    """
    family, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the backbone is random
        detector = build_detector(family, scale.backbone, seed=0, **{**options, **scale.sizes})
    settle(detector.backbone, make_inputs(dataclasses.replace(scale, batch=2)).pixel_values)
    torch.manual_seed(0)
    pretext = SiamesePretext(detector, SiameseConfig(pool_padding=scale.pool_padding)).train()
    set_dropout(pretext, 0.0)
    for module in pretext.modules():
        if isinstance(module, BatchNorm):
            module.eps = EPSILON
    return pretext


@torch.no_grad()
def settle(backbone: nn.Module, images: Tensor) -> None:
    """Give a random backbone what a trained one has: batch norms with the statistics of what passes them, and residual
    branches that count. The last batch norm of each begins with zeros, and an error inside would not show.
    """

    def measure(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3))
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.masked_fill_(norm.weight == 0, 1)

    hooks = [module.register_forward_pre_hook(measure) for module in backbone.modules() if is_norm(module)]
    backbone(images)
    for hook in hooks:
        hook.remove()


def make_inputs(scale: Scale) -> ViewInputs:
    """Smooth noise, of another contrast and colour in every image, so that features differ; the last one of the batch
    is a little smaller.
    """
    random = torch.Generator().manual_seed(0)
    pictures, regions = 2 * scale.batch, scale.regions

    def noise(count: int, height: int, width: int) -> Tensor:
        coarse = torch.randn(count, 3, height // 8 + 1, width // 8 + 1, generator=random)
        coarse = coarse * torch.rand(count, 1, 1, 1, generator=random) + torch.randn(count, 3, 1, 1, generator=random)
        return nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)

    sizes = torch.tensor([[scale.height, scale.width]]).repeat(pictures, 1)
    sizes[scale.batch - 1 :: scale.batch] -= 32
    inside = (torch.arange(scale.height)[:, None] < sizes[:, 0, None, None]) & (
        torch.arange(scale.width) < sizes[:, 1, None, None]
    )
    low = torch.rand(2, scale.batch, regions, 2, generator=random) * 0.5
    shares = torch.cat((low, low + 0.2 + 0.3 * torch.rand(low.shape, generator=random)), -1)
    boxes = shares * sizes.flip(1).repeat(1, 2).view(2, scale.batch, 1, 4)
    return ViewInputs(
        pixel_values=noise(pictures, scale.height, scale.width) * inside[:, None],
        pixel_mask=inside,
        sizes=sizes,
        boxes=boxes,
        query_boxes=boxes,
        crops=noise(pictures * regions, scale.crop, scale.crop),
    )


def to_device(inputs: ViewInputs, device: torch.device | str) -> ViewInputs:
    """The same on another device."""
    values = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    return ViewInputs(
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in values.items()}
    )


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set every dropout of the detector, of attention weights and activations, too."""
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float | int):
                setattr(module, name, probability)


class Clock:
    """Seconds of CPU and wall by part of a step."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[part] += time.process_time() - cpu
        self.wall[part] += time.perf_counter() - wall

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """What was measured since the last time."""
        taken = dict(self.cpu), dict(self.wall)
        self.cpu.clear()
        self.wall.clear()
        return taken


Step = Callable[[ViewInputs], dict[str, Tensor]]
"""One whole step; the unread terms of its loss."""


def plain_step(pretext: SiamesePretext, clock: Clock) -> Step:
    """The plain step."""
    plain = PlainSiamese(pretext, clock)
    optimizer = plain.optimizer()

    def step(inputs: ViewInputs) -> dict[str, Tensor]:
        loss, terms = plain.losses(inputs, *plain.backbone(inputs))
        plain.update(loss, optimizer, CLIP)
        return {"loss": loss.detach(), **terms}

    return step


def our_step(pretext: SiamesePretext, clock: Clock, precision: str) -> Step:
    """Ours as the trainer runs it."""
    accelerate(pretext, next(pretext.parameters()).device)
    optimizer = adamw(pretext, 1e-4, 1e-4, decay_all=True)
    parameters = [parameter for parameter in pretext.parameters() if parameter.requires_grad]
    time_within(pretext, clock)

    def step(inputs: ViewInputs) -> dict[str, Tensor]:
        with torch.autocast(inputs.pixel_values.device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = pretext.frozen_features(inputs)
            with clock("forward"):
                output = pretext(features)
        with clock("backward"):
            output.loss.backward()
        with clock("clip, optimiser"):
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            bad = torch.stack([~output.loss.detach().isfinite(), ~norm.isfinite()]).tolist()
            assert not any(bad)
            nn.utils.clip_grads_with_norm_(parameters, CLIP, norm)
            optimizer.step()
            optimizer.zero_grad()
        clock.cpu["heads, matching, losses"] = clock.cpu.pop("forward") - clock.cpu["Transformer"]
        clock.wall["heads, matching, losses"] = clock.wall.pop("forward") - clock.wall["Transformer"]
        return {"loss": output.loss.detach(), **output.terms}

    return step


def make_step(name: str, pretext: SiamesePretext, clock: Clock) -> Step:
    """The step by its name: plain, or the precision of ours."""
    return plain_step(pretext, clock) if name == "plain" else our_step(pretext, clock, name)


def time_within(pretext: SiamesePretext, clock: Clock) -> None:
    """Time the parts of ours from outside: the backbone's two passes, and the Transformer."""
    detector: Any = pretext.detector
    features, predict = detector.features, pretext.predict

    def timed_features(pixels: Tensor, *args: Any, **options: Any) -> list[Tensor]:
        square = pixels.shape[-1] == pixels.shape[-2]
        with clock("backbone, crops" if square else "backbone, views"):
            return features(pixels, *args, **options)

    def timed_predict(*args: Any) -> Any:
        with clock("Transformer"):
            return predict(*args)

    detector.features, pretext.predict = timed_features, timed_predict  # type: ignore[method-assign]


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of any loss term, relative to terms above 1."""
    if a.keys() != b.keys():
        raise AssertionError(f"other terms: {sorted(a.keys() ^ b.keys())}")
    return max(abs(float(a[name]) - float(b[name])) / max(1.0, abs(float(a[name]))) for name in a)


class HostReads(TorchDispatchMode):
    """Counts where the host would wait for an accelerator: reads of scalars, copies to the host, shapes by value."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal")
    methods = ("cpu", "tolist", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_value = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.count += name in self.waiting or by_value
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        self.stock = {name: getattr(Tensor, name) for name in self.methods}

        def counted(name: str) -> Callable[..., Any]:
            def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
                if name != "numpy":  # follows .cpu()
                    self.count += 1
                return self.stock[name](tensor, *args, **options)

            return call

        for name in self.methods:
            setattr(Tensor, name, counted(name))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for name, method in self.stock.items():
            setattr(Tensor, name, method)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": float(np.median(values)), "min": min(values), "max": max(values)}


def blocking_reads(case: str, name: str) -> int:
    """Of the second step; their number does not depend on sizes, so small ones do."""
    inputs = make_inputs(Scale.quick())
    step = make_step(name, make_pretext(case, Scale.quick()), Clock())
    step(inputs)
    with HostReads() as counted:
        step(inputs)
    return counted.count


def serve(pipe: Connection, name: str, case: str, scale: Scale, dropout: float, threads: int) -> None:
    """Take steps of one kind in this process, as it would be if nothing else ran in it.

    Sends the terms of a first step without dropout. Then, for every number received, takes a step seeded with it and
    sends the clock's times; at None sends the most memory held above what was held before the first step, in MB.
    """
    torch.set_num_threads(threads)
    inputs, pretext, clock = make_inputs(scale), make_pretext(case, scale), Clock()
    step = make_step(name, pretext, clock)
    with contextlib.suppress(OSError):  # Linux: forget the peak of the imports and of building the model
        Path("/proc/self/clear_refs").write_text("5")
    before = current_memory()
    pipe.send({term: float(value) for term, value in step(inputs).items()})
    set_dropout(pretext, dropout)
    while (seed := pipe.recv()) is not None:
        torch.manual_seed(seed)
        clock.take()
        step(inputs)
        pipe.send(clock.take())
    pipe.send((peak_memory() - before) / 1e6)


def measure(
    case: str, scale: Scale, rounds: int, dropout: float, precisions: list[str], threads: int
) -> dict[str, Any]:
    """Compare the losses, then time the steps in turn. Each kind has a process of its own."""
    spawn, pipes = multiprocessing.get_context("spawn"), {}
    for name in ("plain", *precisions):
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(theirs, name, case, scale, dropout, threads), daemon=True).start()
        theirs.close()
    terms = {name: pipe.recv() for name, pipe in pipes.items()}
    apart = {name: difference(terms["plain"], terms[name]) for name in precisions}
    if apart.get("fp32", 0) > TOLERANCE:
        raise AssertionError(f"{case}: losses differ by {apart['fp32']}, more than {TOLERANCE}")

    times: dict[str, dict[str, dict[str, list[float]]]] = {
        name: {"cpu": defaultdict(list), "wall": defaultdict(list)} for name in pipes
    }
    for n in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(n)
            taken = pipe.recv()
            if n == 0:
                continue  # warms up
            for kind, seconds in zip(("cpu", "wall"), taken, strict=True):
                for part, value in {**seconds, "whole step": sum(seconds.values())}.items():
                    times[name][kind][part].append(value * 1e3)
    peaks = {}
    for name, pipe in pipes.items():
        pipe.send(None)
        peaks[name] = pipe.recv()
    return {
        "largest difference of losses": apart,
        "blocking reads": {"plain": blocking_reads(case, "plain"), "ours": blocking_reads(case, "fp32")},
        "milliseconds": {
            name: {kind: {part: spread(values) for part, values in parts.items()} for kind, parts in kinds.items()}
            for name, kinds in times.items()
        },
        "ratios": {
            precision: {
                kind: {
                    part: spread([p / o for p, o in zip(plain, times[precision][kind][part], strict=True)])
                    for part, plain in times["plain"][kind].items()
                }
                for kind in ("cpu", "wall")
            }
            for precision in precisions
        },
        "peak memory, MB": peaks,
    }


def current_memory() -> float:
    """Bytes this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_memory() -> float:
    """The most bytes it held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tables(summary: dict[str, Any]) -> str:
    """The summary in Markdown: CPU milliseconds (wall), and ratios of CPU time."""
    precisions = summary["precisions"]
    lines = []
    for case, result in summary["cases"].items():
        head = ["part", "plain", *precisions, *(f"plain / {p}, CPU [min-max]" for p in precisions)]
        head += [f"plain / {p}, wall" for p in precisions]
        lines += [f"**{case}** (ms of CPU per step)", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for part in (*PARTS, "whole step"):
            row = [part, *(f"{result['milliseconds'][n]['cpu'][part]['median']:.0f}" for n in ("plain", *precisions))]
            for kind in ("cpu", "wall"):
                for precision in precisions:
                    ratio = result["ratios"][precision][kind][part]
                    row.append(f"{ratio['median']:.2f}")
                    if kind == "cpu":
                        row[-1] += f" [{ratio['min']:.2f}-{ratio['max']:.2f}]"
            lines.append(f"| {' | '.join(row)} |")
        reads = result["blocking reads"]
        lines += ["", f"Blocking reads: plain {reads['plain']}, ours {reads['ours']}. "]
        apart = (f"{name} {value:.1e}" for name, value in result["largest difference of losses"].items())
        lines[-1] += f"Largest difference of any loss term without dropout: {', '.join(apart)}. "
        peaks = (f"{name} {value:.0f}" for name, value in result["peak memory, MB"].items())
        lines[-1] += f"Peak memory over the process's base, MB: {', '.join(peaks)}."
        lines.append("")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dropout", type=float, default=0.1, help="all dropouts while timing (the papers: 0.1)")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "bf16"),
        default=["fp32"] if emulates_bf16("cpu") else ["fp32", "bf16"],
        help="default: both, but for bf16 where it is only emulated",
    )
    parser.add_argument("--pool-padding", action="store_true", help="as the research code pools")
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    scale = dataclasses.replace(Scale.quick() if options.quick else Scale(), pool_padding=options.pool_padding)
    rounds = 1 if options.quick else options.rounds
    summary: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "threads": options.threads,
        "dropout": options.dropout,
        "pool padding": options.pool_padding,
        "precisions": options.precisions,
        "cases": {},
    }
    for case in options.cases:
        result = measure(case, scale, rounds, options.dropout, options.precisions, options.threads)
        summary["cases"][case] = result
        print(tables({**summary, "cases": {case: result}}), flush=True)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "step.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "step.md").write_text(tables(summary))
    return summary


if __name__ == "__main__":
    main()
