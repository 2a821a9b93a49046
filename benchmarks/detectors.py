"""Every detector family: parameters, and the time of one pre-training step behind the frozen backbone.

    python benchmarks/detectors.py [--device cpu] [--side 320] [--pairs 4] [--rounds 9] [--out benchmarks/results]

All detectors have the same width, depth and number of queries, the same backbone (a random ResNet-18, ViTs where a
family takes no other) and the same pictures; their steps are taken in turn, so that whatever else the machine does
falls on all of them. A step is the Siamese pretext's forward and backward pass and one AdamW update on stored backbone
features. Prints a table (medians, and their ratio to Conditional DETR) and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LwDetrViTConfig, RfDetrDinov2Config

from siamese_detr.detectors import FAMILIES, build_detector
from siamese_detr.pretext.features import FrozenFeatures
from siamese_detr.pretext.siamese import SiamesePretext

REGIONS = 10
VITS = {
    "lw-detr": LwDetrViTConfig(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=12, window_block_indices=[0, 2, 4],
        out_features=["stage2", "stage4", "stage6"], image_size=320, pretrain_image_size=320, num_windows=16,
    ),
    "rf-detr": RfDetrDinov2Config(
        hidden_size=192, num_hidden_layers=6, num_attention_heads=6, out_features=["stage2", "stage4", "stage6"],
        image_size=320, patch_size=16, num_windows=2,
    ),
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "deformable-detr, one scale": ("deformable-detr", {"num_feature_levels": 1}),
    "deformable-detr, refined": ("deformable-detr", {"with_box_refine": True}),
}


class Step:
    """A detector in pre-training, and a batch for it."""

    def __init__(self, family: str, options: dict[str, Any], arguments: argparse.Namespace) -> None:
        sizes = dict(
            num_queries=arguments.queries, hidden_size=256, heads=8, decoder_layers=arguments.layers, ffn_size=1024
        )
        detector = build_detector(family, VITS.get(family, "random:resnet18"), seed=0, **sizes, **options)
        self.detector = detector.to(arguments.device)
        self.pretext = SiamesePretext(self.detector).to(arguments.device).train()
        self.optimizer = torch.optim.AdamW([p for p in self.pretext.parameters() if p.requires_grad], lr=1e-4)
        side, views = arguments.side, 2 * arguments.pairs
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(views, 3, side, side, generator=generator).to(arguments.device)
        mask = torch.ones(views, side, side, dtype=torch.bool, device=arguments.device)
        corners = torch.rand(2, arguments.pairs, REGIONS, 2, 2, generator=generator).to(arguments.device) * side
        boxes = torch.cat((corners.amin(-2), corners.amax(-2) + 8), -1).clamp(max=side)
        channels = sum(self.detector.channels)
        self.features = FrozenFeatures(
            maps=self.detector.features(images, mask),
            pixel_mask=mask,
            sizes=torch.full((views, 2), side, device=arguments.device),
            boxes=boxes,
            query_boxes=boxes,
            crop_features=torch.randn(2, arguments.pairs, REGIONS, channels, generator=generator).to(arguments.device),
        )

    def __call__(self) -> float:
        """Take one step: its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.pretext(self.features).loss.backward()
        self.optimizer.step()
        if self.features.boxes.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def sizes(self) -> tuple[float, float]:
        """Parameters of the detector without its backbone, and those pre-training trains, in millions."""
        backbone = {id(p) for p in self.detector.backbone.parameters()}
        own = [p for p in self.detector.parameters() if id(p) not in backbone]
        return sum(p.numel() for p in own) / 1e6, sum(p.numel() for p in own if p.requires_grad) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=320, help="of the square views, in pixels (a multiple of 64)")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--layers", type=int, default=6, help="decoder layers (encoder layers as the family has)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    names = ["conditional-detr", *(name for name in arguments.only if name != "conditional-detr")]
    steps = {name: Step(*VARIANTS[name], arguments) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 1):
        for name, step in steps.items():
            seconds = step()
            if turn:  # the first warms up
                times[name].append(seconds)
    table = Table("detector", "M parameters", "of these pre-trained", "ms per step", "relative")
    base = statistics.median(times["conditional-detr"])
    results = {}
    for name, step in steps.items():
        (own, trained), median = step.sizes(), statistics.median(times[name])
        results[name] = {"parameters": own, "trained": trained, "ms": median * 1e3, "relative": median / base}
        table.add_row(name, f"{own:.1f}", f"{trained:.1f}", f"{median * 1e3:.0f}", f"{median / base:.2f}")
    Console().print(table)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {k: v for k, v in vars(arguments).items() if k not in ("out", "only")}
        file = arguments.out / "detectors.json"
        file.write_text(json.dumps({**machine, **settings, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
