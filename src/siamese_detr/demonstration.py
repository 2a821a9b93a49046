"""The whole workflow on a small example: images, proposals, pre-training, fine-tuning, metrics, pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from siamese_detr.config import Options, verb, write_config
from siamese_detr.errors import UserError
from siamese_detr.files import write_json
from siamese_detr.images.listing import list_images
from siamese_detr.scenes import make_scenes

if TYPE_CHECKING:
    from siamese_detr.evaluation.results import ImageResult
    from siamese_detr.images.labels import DetectionDataset

SIDE = 160
"""Pixels of a side of what the detector sees: a little less than the recipe says, for speed."""
CLASSES = 32
"""Pseudo-classes of pre-training: fewer than usual, since the scenes hold little variety."""


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
    unlabelled: int = 160
    labelled: int = 24
    validation: int = 60
    pretrain_steps: int = 400
    finetune_epochs: int = 28
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
    """Run the whole workflow on a small example, in about five minutes on two CPU cores.

    Returns:
        the metrics with and without pre-training, and the seconds of each stage.
    """
    # Imported here so that --help does not wait for PyTorch to load.
    from siamese_detr import finetune, predict, pretrain, propose
    from siamese_detr.evaluation.coco import percent
    from siamese_detr.images.labels import read_labels

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

    stage(3, "pretrain", f"Pre-training without labels: detect {CLASSES} k-means classes of these boxes")
    pretrain(
        recipe="laptop",
        method="clusters",
        classes=CLASSES,
        view_size=SIDE,
        crop_size=64,
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
            recipe="laptop",
            image_size=SIDE,
            train=str(train),
            val=str(val),
            out=str(out / f"finetuned-{name}"),
            epochs=config.finetune_epochs,
            eval_every=0,
            seed=config.seed,
            model=str(out / "pretrained") if name == "pretrained" else None,
        )
        metrics[name] = tuned.last  # the best evaluation would have been chosen on the same validation scenes
        done(f"finetune-{name}")

    stage(6, "predict", "Pictures of what both detectors find in the validation scenes")
    found = {}
    for name, title in (("scratch", "from scratch"), ("pretrained", "pre-trained")):
        model, pictures = out / f"finetuned-{name}" / "last", out / f"pictures-{name}"
        found[title] = predict(model=str(model), images=str(out / "validation"), out=str(pictures)).results
    side_by_side(read_labels(val), found, out / "side-by-side.jpg")
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
  {out}/side-by-side.jpg           labels, from scratch, pre-trained: six validation scenes
  {out}/pictures-pretrained        all validation scenes with predicted boxes
  {out}/pretrained/tensorboard     curves of all losses (tensorboard --logdir {out})
  {out}/finetuned-pretrained/last  an ordinary Hugging Face detector

Next, on your own photos and labels (COCO JSON, VOC or YOLO):
  siamese-detr pretrain --recipe laptop --images PHOTOS --out runs/pretrained
  siamese-detr finetune --recipe laptop --train TRAIN.json --val VAL.json --model runs/pretrained --out runs/detector
  siamese-detr predict --model runs/detector/best --images PHOTOS --out runs/pictures"""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return result


def side_by_side(labels: DetectionDataset, found: Mapping[str, Sequence[ImageResult]], path: Path) -> None:
    """Write one picture of the first images: a row each, first with the labels, then with what each detector found.

    Args:
        labels: of the images.
        found: title of a column -> detections in all images.
        path: of the JPEG.
    """
    from PIL import Image, ImageDraw

    from siamese_detr.evaluation.draw import draw_detections, font
    from siamese_detr.images.decode import read_image

    columns = {title: {result.job.path: result for result in results} for title, results in found.items()}
    pictures: list[list[Image.Image]] = []
    for item in labels.images[:6]:
        image, names = read_image(item.path), labels.class_names
        row = [draw_detections(image, item.boxes, item.classes, None, names)]
        for results in columns.values():
            result = results[str(item.path)]
            row.append(draw_detections(image, result.boxes, result.classes, result.scores, names))
        pictures.append(row)
    width, height = pictures[0][0].size
    gap, head = 8, 40
    sheet = Image.new("RGB", ((width + gap) * (1 + len(found)) - gap, head + (height + gap) * len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("labels", *columns)):
        draw.text((column * (width + gap) + gap, gap), title, fill="black", font=font(24))
        for number, row in enumerate(pictures):
            sheet.paste(row[column], (column * (width + gap), head + number * (height + gap)))
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(path, quality=90)
