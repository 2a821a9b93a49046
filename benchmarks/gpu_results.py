"""What the recipe ``gpu`` brings on one GPU, in a run of about ten minutes.

    python benchmarks/gpu_results.py TRAIN.json VAL.json OUT [--size 320] [--steps 1500 600] [--device cuda]

Pre-trains on the training images and fine-tunes with 1, 10 and 100 % of their labels, from the backbone alone and from
pre-training (``siamese-detr compare --recipe gpu``), at a size and with budgets that fit into the time. The backbone is
the one that is installed with the package, so that no network is needed.
"""

from __future__ import annotations

import argparse
from typing import Any

import siamese_detr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("out")
    parser.add_argument("--size", type=int, default=320, help="side of the pictures in pixels")
    parser.add_argument("--steps", type=int, nargs=2, default=(1500, 600), help="of pre-training, of each fine-tuning")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="bf16")
    given = parser.parse_args()
    common: dict[str, Any] = {"backbone": "efficientnet-lite0", "device": given.device, "precision": given.precision}
    result = siamese_detr.compare(
        recipe="gpu",
        images=given.train,
        train=given.train,
        val=given.val,
        out=given.out,
        pretrain=common | {"view_size": given.size, "crop_size": given.size // 4, "steps": given.steps[0]},
        finetune=common | {"image_size": given.size, "min_size": given.size * 3 // 4, "steps": given.steps[1]},
    )
    print(result)


if __name__ == "__main__":
    main()
