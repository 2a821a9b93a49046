"""Fine-tuning, ours against Hugging Face's Trainer: the same model, initial weights, photos and number of updates.

    python benchmarks/finetune.py TRAIN.json VAL.json [--families rt-detr ...] [--updates 300] [--batch 8] [--side 192]
        [--seeds 0 1] [--lr 2e-4] [--device auto] [--out benchmarks/results]

Ours is ``finetune`` with its defaults. Theirs is ``Trainer`` with the model's stock loss and the augmentation of
Transformers' object-detection example, written with torchvision's v2 transforms in place of albumentations: crops that
keep all boxes, blur, perspective, flip, brightness and contrast, hue and saturation, with the example's probabilities.
Both have AdamW, the learning rate (ours a quarter of it for the backbone), a cosine schedule, the clipping and squares
of one side; both load images in the training process. Both results are measured by ``evaluate``. Speed is that of all
updates but the first: CPU time, or wall time on a GPU. Then detection in the validation photos: what ``predict`` does
between opening and writing files, against ``pipeline("object-detection")`` photo by photo (in batches it fails for
RT-DETR: it cuts the list of feature maps as if it were a batch), each for the second time. Prints tables and writes
finetune.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import AutoImageProcessor, AutoModelForObjectDetection, Trainer, TrainerCallback, TrainingArguments
from transformers import pipeline as make_pipeline

from siamese_detr.detectors import build_detector
from siamese_detr.evaluation.evaluate import evaluate
from siamese_detr.evaluation.inference import Detector, run
from siamese_detr.evaluation.results import Job
from siamese_detr.images.labels import DetectionDataset, read_labels
from siamese_detr.training.finetune import finetune
from siamese_detr.training.task import Callback

SIZES = {
    **{"num_queries": 50, "hidden_size": 128, "heads": 8, "encoder_layers": 2, "decoder_layers": 3, "ffn_size": 512},
    **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0},
}
"""Those of the recipe ``laptop``."""
FAMILIES = ("conditional-detr", "rt-detr", "d-fine")
CLIP = 0.1
Clock = Callable[[], float]


class Pace:
    """Updates per second, without the first.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []

    def mark(self) -> None:
        self.times.append(self.clock())

    @property
    def rate(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class OurPace(Callback):
    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_log(self, step: int, values: Any) -> None:
        self.pace.mark()


class TheirPace(TrainerCallback):
    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.pace.mark()


class CropKeepingBoxes(v2.Transform):
    """A random rectangle with all boxes in it (albumentations' RandomSizedBBoxSafeCrop)."""

    def forward(self, *inputs: Any) -> Any:
        image, boxes, labels = inputs
        height, width = image.shape[-2:]
        whole = torch.tensor([0.0, 0.0, width, height])
        inner = torch.cat([boxes[:, :2].amin(0), boxes[:, 2:].amax(0)]).clamp(min=0) if len(boxes) else whole / 2
        left, top, right, bottom = (inner + torch.rand(4) * (whole - inner)).tolist()
        place = int(top), int(left), max(1, round(bottom - int(top))), max(1, round(right - int(left)))
        return v2.functional.crop(image, *place), v2.functional.crop(boxes, *place), labels


def example_augmentation() -> v2.Compose:
    """Of (image, boxes, labels); probabilities and strengths as in Transformers' example."""
    return v2.Compose(
        [
            v2.RandomApply([CropKeepingBoxes()], p=0.2),
            v2.RandomApply([v2.GaussianBlur(7)], p=0.05),
            v2.RandomPerspective(distortion_scale=0.2, p=0.1),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([v2.ColorJitter(brightness=0.2, contrast=0.2)], p=0.5),
            v2.RandomApply([v2.ColorJitter(saturation=0.2, hue=0.05)], p=0.1),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1, labels_getter=lambda inputs: inputs[2]),
        ]
    )


class ExampleImages(Dataset):
    """Augmented and processed as in Transformers' example.

    Args:
        dataset: labelled images.
        processor: of the detector.
    """

    def __init__(self, dataset: DetectionDataset, processor: Any) -> None:
        self.dataset, self.processor, self.augment = dataset, processor, example_augmentation()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset.images[index]
        pixels = torch.from_numpy(np.array(Image.open(item.path).convert("RGB"))).permute(2, 0, 1)
        wanted = ~np.asarray(item.crowd, bool)
        corners = torch.from_numpy(item.boxes[wanted].astype(np.float32))
        boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=pixels.shape[-2:])
        parts = self.augment(tv_tensors.Image(pixels), boxes, torch.from_numpy(item.classes[wanted]))
        pixels, (boxes, classes) = parts[0], parts[1:]
        annotations = [
            {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": label, "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), classes.tolist(), strict=True)
        ]
        labels = {"image_id": index, "annotations": annotations}
        return self.processor(images=pixels.as_subclass(torch.Tensor), annotations=labels, return_tensors="pt")


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """As in Transformers' example; squares need no mask."""
    return {
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "labels": [sample["labels"][0] for sample in samples],
    }


def theirs(start: Path, out: Path, dataset: DetectionDataset, seed: int, options: argparse.Namespace) -> float:
    """Fine-tune with Trainer into ``out``; updates per second."""
    model, processor = AutoModelForObjectDetection.from_pretrained(start), AutoImageProcessor.from_pretrained(start)
    pace = Pace(options.clock)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=options.updates, per_device_train_batch_size=options.batch,
        seed=seed, learning_rate=options.lr, weight_decay=1e-4, lr_scheduler_type="cosine", max_grad_norm=CLIP,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, remove_unused_columns=False,
        dataloader_num_workers=0, use_cpu=options.device == "cpu",
    )  # fmt: skip
    images = ExampleImages(dataset, processor)
    trainer = Trainer(model, arguments, collate, train_dataset=images, callbacks=[TheirPace(pace)])
    trainer.train()
    trainer.model.save_pretrained(out)
    processor.save_pretrained(out)
    return pace.rate


def ours(start: Path, out: Path, seed: int, options: argparse.Namespace) -> float:
    """Fine-tune into ``out/last``; updates per second."""
    pace = Pace(options.clock)
    finetune(
        options.train, str(out), model=str(start), steps=options.updates, batch_size=options.batch, seed=seed,
        lr=options.lr, backbone_lr=options.lr / 4, schedule="cosine", clip=CLIP, workers=0, log_every=1, progress=False,
        save_every=options.updates, device=options.device, callbacks=[OurPace(pace)],
    )  # fmt: skip
    return pace.rate


def second_time(detect: Callable[[], Any], clock: Clock) -> float:
    """Seconds of a call, when another one has been made."""
    detect()
    began = clock()
    detect()
    return clock() - began


def detection_rates(directory: Path, photos: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Photos per second: ours and the pipeline's."""
    detector = Detector.load(directory, options.device)
    jobs = [Job(n, photo) for n, photo in enumerate(photos)]
    pipe = make_pipeline(
        "object-detection", model=str(directory), image_processor=str(directory), device=detector.device
    )
    calls: dict[str, Callable[[], Any]] = {
        "ours": lambda: list(run(detector, jobs, batch_size=options.batch, workers=0)),
        "theirs": lambda: pipe(photos, threshold=0.0),
    }
    return {name: len(photos) / second_time(call, options.clock) for name, call in calls.items()}


def compare(family: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both fine-tunings of a family, seed by seed, and both detections."""
    dataset, measured = read_labels(options.train), read_labels(options.val, default_split="val")
    rows = []
    for seed in options.seeds:
        place = folder / f"{family}-{seed}"
        detector = build_detector(family, options.backbone, class_names=dataset.class_names, seed=seed, **options.sizes)
        detector.save(place / "start", shortest_edge=options.side, longest_edge=options.side, square=True)
        row: dict[str, Any] = {"seed": seed, "images/s": {}, "AP": {}, "AP50": {}}
        for name in ("ours", "theirs"):
            if name == "ours":
                rate, result = ours(place / "start", place / name, seed, options), place / name / "last"
            else:
                rate, result = theirs(place / "start", place / name, dataset, seed, options), place / name
            metrics = evaluate(str(result), options.val, device=options.device, workers=0).overall()
            row["images/s"][name] = rate * options.batch
            row["AP"][name], row["AP50"][name] = (100 * (metrics[key] or 0.0) for key in ("AP", "AP50"))
        print(json.dumps({"family": family, **row}), flush=True)
        rows.append(row)
    photos = [str(item.path) for item in measured.images]
    return {"seeds": rows, "photos/s": detection_rates(place / "ours" / "last", photos, options)}


def table(summary: dict[str, Any]) -> str:
    """Means over the seeds as Markdown; speeds as ratios, ours / theirs."""
    lines = ["| | AP ours / theirs | AP50 ours / theirs | training speed | detection speed |", "|---|---|---|---|---|"]
    for family, result in summary["families"].items():
        cells = []
        for metric in ("AP", "AP50"):
            means = (statistics.mean(row[metric][who] for row in result["seeds"]) for who in ("ours", "theirs"))
            cells.append(" / ".join(f"{mean:.1f}" for mean in means))
        trained = statistics.mean(row["images/s"]["ours"] / row["images/s"]["theirs"] for row in result["seeds"])
        detected = result["photos/s"]["ours"] / result["photos/s"]["theirs"]
        lines.append(f"| {family} | {cells[0]} | {cells[1]} | {trained:.2f} | {detected:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1))
    for name, default in (("updates", 300), ("batch", 8), ("side", 192), ("lr", 2e-4)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args(arguments)
    if not torch.accelerator.is_available():
        options.device = "cpu"
    options.sizes, options.clock = SIZES, time.process_time if options.device == "cpu" else time.perf_counter
    shown = {name: value for name, value in vars(options).items() if name != "clock"}
    summary: dict[str, Any] = {"options": shown, "families": {}}
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        for family in options.families:
            summary["families"][family] = compare(family, options, Path(folder))
            (out / "finetune.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(table(summary))
    return summary


if __name__ == "__main__":
    main()
