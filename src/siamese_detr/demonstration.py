"""The whole workflow on a small example: images, proposals, pre-training, fine-tuning, metrics, pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from siamese_detr.config import Options, verb, write_config
from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.images.listing import list_images
from siamese_detr.images.scenes import make_scenes


@dataclass
class DemoConfig(Options):
    """Run the whole workflow on a small example, in about five minutes on two CPU cores.

    Args:
        out: folder for all results.
        images: your own images to pre-train on (a folder, a list file or a COCO JSON) instead of generated scenes.
        unlabelled: number of generated scenes to pre-train on.
        labelled: number of labelled scenes to fine-tune on.
        validation: number of labelled scenes to measure on.
        pretrain_steps: steps of pre-training.
        finetune_epochs: passes over the labelled scenes, the same from scratch and from pre-training.
        seed: random seed.
    """

    out: str = "siamese-detr-demo"
    images: str | None = None
    unlabelled: int = 240
    labelled: int = 60
    validation: int = 60
    pretrain_steps: int = 500
    finetune_epochs: int = 30
    seed: int = 0

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if self.images is not None:
            yield ("unlabelled",), "pre-training uses your own images"


@dataclass
class DemoResult:
    """Results of the demonstration: COCO metrics on the validation scenes (0 to 1), and seconds per stage."""

    out: str
    scratch: dict[str, float]
    pretrained: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)


@verb(DemoConfig)
def demo(config: DemoConfig) -> DemoResult:
    """Run the whole workflow on a small example, in about five minutes on two CPU cores."""
    # Imported here so that --help does not wait for PyTorch to load.
    from siamese_detr import finetune, predict, pretrain, propose
    from siamese_detr.evaluation.coco import percent

    out = Path(config.out)
    if (out / "demo.json").exists() or (out / "pretrained").exists():
        raise UserError(f"{out} already holds a demonstration: choose another folder with --out, or delete it")
    if out.exists() and not (out.is_dir() and ((out / "demo.yaml").exists() or not any(out.iterdir()))):
        raise UserError(f"{out} is not an empty folder: choose another one with --out")
    if config.images is not None:
        list_images(config.images)  # a wrong path ends the demonstration now, not after the scenes have been made
    console = Console()
    seconds: dict[str, float] = {}
    write_config(config, out / "demo.yaml")

    def stage(number: int, name: str, text: str) -> None:
        seconds[name] = -time.monotonic()
        console.print(f"\n[bold]{number}/6  {text}[/bold]")

    def done(name: str) -> None:
        seconds[name] += time.monotonic()

    stage(1, "scenes", "Scenes: composed from the photographs that scikit-image ships")
    train = make_scenes(out / "labelled", config.labelled, seed=3 * config.seed + 1)
    val = make_scenes(out / "validation", config.validation, seed=3 * config.seed + 2)
    images = config.images
    if images is None:
        make_scenes(out / "unlabelled", config.unlabelled, seed=3 * config.seed).unlink()  # no labels here
        images = str(out / "unlabelled")
    done("scenes")

    stage(2, "propose", f"Proposals: where might objects be in {images}?")
    propose(images=images, out=str(out / "proposals"))
    done("propose")

    stage(3, "pretrain", "Pre-training without labels: find the regions of one view of an image in its other view")
    pretrain(
        recipe="demo",
        images=images,
        out=str(out / "pretrained"),
        proposals=str(out / "proposals"),
        steps=config.pretrain_steps,
        seed=config.seed,
    )
    done("pretrain")

    metrics: dict[str, dict[str, float]] = {}
    for number, name, text in (
        (4, "scratch", "Fine-tuning from scratch (backbone pre-trained, Transformer random)"),
        (5, "pretrained", "The same fine-tuning, starting from the pre-trained detector"),
    ):
        stage(number, f"finetune-{name}", f"{text} on {config.labelled} labelled scenes")
        tuned = finetune(
            recipe="demo",
            train=str(train),
            val=str(val),
            out=str(out / f"finetuned-{name}"),
            epochs=config.finetune_epochs,
            seed=config.seed,
            model=str(out / "pretrained") if name == "pretrained" else None,
        )
        metrics[name] = tuned.last  # the best evaluation would have been chosen on the same validation scenes
        done(f"finetune-{name}")

    stage(6, "predict", "Pictures of the fine-tuned detector's predictions")
    predict(
        model=str(out / "finetuned-pretrained" / "last"),
        images=str(out / "validation"),
        out=str(out / "pictures"),
        threshold=0.3,
    )
    done("predict")

    result = DemoResult(str(out), metrics["scratch"], metrics["pretrained"], seconds)
    write_json(out / "demo.json", vars(result))
    table = Table(title=f"COCO metrics on {config.validation} validation scenes, in % (higher is better)")
    for column in ("start", "AP", "AP50", "AP75"):
        table.add_column(column)
    for name, text in (("scratch", "from scratch"), ("pretrained", "pre-trained")):
        table.add_row(text, *(percent(metrics[name][key]) for key in ("AP", "AP50", "AP75")))
    console.print(table)
    text = f"""{sum(seconds.values()) / 60:.1f} minutes. Look at:
  {out}/pictures/pictures          the validation scenes with predicted boxes
  {out}/pretrained/tensorboard     curves of all losses (tensorboard --logdir {out})
  {out}/finetuned-pretrained/last  an ordinary Hugging Face detector

Next, on your own photos and labels (COCO JSON, VOC or YOLO):
  siamese-detr pretrain --recipe laptop --images PHOTOS --out runs/pretrained
  siamese-detr finetune --recipe laptop --train TRAIN.json --val VAL.json --model runs/pretrained --out runs/detector
  siamese-detr predict --model runs/detector/best --images PHOTOS --out runs/pictures"""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return result
