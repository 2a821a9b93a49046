"""Curves of fine-tuning runs side by side: python benchmarks/plot_curves.py OUT.svg NAME=RUN [NAME=RUN ...]"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from siamese_detr.runtime.journal import JsonLines

matplotlib.use("svg")
from matplotlib import pyplot as plt


def main(out: str, *runs: str) -> None:
    figure, (loss, ap) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for run in runs:
        name, _, folder = run.partition("=")
        log = JsonLines(Path(folder) / "log.jsonl").read()
        history = JsonLines(Path(folder) / "history.jsonl").read()
        loss.plot([record["step"] for record in log], [record["loss_box"] for record in log], label=name)
        ap.plot([0, *(r["epoch"] for r in history)], [0, *(100 * r["AP50"] for r in history)], marker="o", label=name)
    loss.set(xlabel="update", ylabel="L1 loss of the boxes (last layer)")
    ap.set(xlabel="epoch", ylabel="AP50 on the validation photos (%)")
    loss.legend()
    ap.legend()
    figure.savefig(out)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
