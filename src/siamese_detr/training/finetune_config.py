"""Everything ``finetune`` can be told, flat, and how it divides into the parts' own configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from siamese_detr.config import check_numbers
from siamese_detr.errors import UserError
from siamese_detr.training.sizes import DROPOUTS, SIZES, given

if TYPE_CHECKING:  # load PyTorch, for which --help need not wait
    from siamese_detr.detectors.adapter import DetectorAdapter
    from siamese_detr.training.labelled_dataset import InputSize, TransformConfig

MAY_CHANGE = {
    *("resume", "replay", "workers", "device", "progress", "report_to", "save_every", "keep", "log_every"),
    *("steps", "epochs", "max_bad_share", "kernels", "out", "eval_batch_size", "eval_every"),
    *("train", "val", "train_images", "val_images", "model", "init"),  # whose content is compared
}
"""What a resumed run may be told otherwise than before: it does not change what an update computes, but ``steps`` and
``epochs`` what the learning rate's schedule has left."""
Value = int | float | bool | str


@dataclass
class FinetuneConfig:
    """Fine-tune a detector on labelled images: from a pre-trained one (--model), or from scratch.

    OUT/best and OUT/last are Hugging Face directories. Killed at any moment, the same command with --resume continues
    exactly. On SIGTERM or SIGUSR1 the run saves itself and exits with code 75.

    Args:
        train: labels to learn from: COCO JSON, VOC folder or YOLO data.yaml.
        out: run directory: best/ and last/ (Hugging Face detectors), metrics.json, history.jsonl, log.jsonl,
            tensorboard/.
        val: labels to evaluate on; without them only last/ is written.
        model: where to start from: a pre-training run, or any Hugging Face detector of a known family; the class
            head is re-made for the labels' classes, everything else kept. Without it the detector starts from scratch.
        init: another name for model.
        train_images: folder of the training images, where it is not the usual one.
        val_images: folder of the validation images, where it is not the usual one.
        fraction: part of the training images to use, above 0 to 1; reproducible, and with every class in it.
        patience: stop after so many evaluations without a higher AP (0: never).
        ema: average the weights over updates with at most this decay, 0 to 1 (0: do not); the averages are what is
            evaluated and saved.
        seed: of everything random: the part taken, initial values, order, augmentation, dropout.
        detector: family, from scratch only.
        backbone: its backbone, from scratch only.
        num_queries: object queries, from scratch only, like the following sizes; default: the family's.
        hidden_size: width of the Transformer.
        heads: attention heads.
        encoder_layers: depth of the encoder.
        decoder_layers: depth of the decoder.
        ffn_size: width of the feed-forward blocks.
        dropout: dropout probability in the Transformer; default: the family's, or the starting detector's.
        attention_dropout: dropout of attention weights, likewise.
        activation_dropout: dropout inside the feed-forward blocks, likewise.
        detector_options: further options of the family, from scratch only.
        epochs: passes over the training images.
        steps: updates, in place of epochs.
        batch_size: images per update, over all processes.
        accumulate: micro-batches per update.
        lr: learning rate.
        backbone_lr: learning rate of the backbone; 0: frozen, and run without gradients.
        freeze: parts that do not learn, by the names of modules: encoder, decoder, backbone, blocks.0, ...
        weight_decay: AdamW's, on weight matrices.
        schedule: learning rate: step (a tenth from drop_at on), constant, cosine or one-cycle.
        drop_at: share of the run after which the rate drops to a tenth.
        warmup: steps of linear warm-up.
        clip: largest gradient norm; 0: none.
        image_size: short side at evaluation and largest in training; default: the starting detector's, or 800.
        max_size: limit of the long side; default: in proportion to 800 : 1333.
        min_size: smallest short side in training; default: 60 % of image_size, and for squares image_size.
        square: stretch images to image_size x image_size; default: as the starting detector does, or no.
        augment: light (DETR's: crop, flip, colour_jitter) or strong (RT-DETR's: also distorted colours, zooming out,
            crops around boxes).
        crop: probability of the random crop.
        flip: probability of the horizontal flip.
        colour_jitter: brightness, contrast and saturation change by up to this share.
        eval_every: epochs between evaluations; 0: only at the end.
        eval_batch_size: images per forward pass in evaluation; default: batch_size.
        workers: data processes per training process; default: all cores but one, at most 8.
        precision: fp32, bf16 or fp16 (autocast).
        device: auto or cpu.
        kernels: auto exchanges modules for faster ones that compute the same; off exchanges none; hub also lets
            Transformers load kernels from the Hugging Face hub (needs the package kernels).
        save_every: updates between checkpoints; default: about as often as the evaluations, at most every 500.
        keep: newest checkpoints that remain; 0: all.
        log_every: updates between logs.
        max_bad_share: largest share of unreadable images that the run tolerates.
        progress: show a progress bar.
        resume: continue the run in out, exactly (or begin it).
        replay: nonfinite.json of a stopped run: do that step again and say what was not finite.
        report_to: further trackers (wandb, mlflow, …).
    """

    COMMON = (
        *("train", "out", "val", "model", "train_images", "fraction", "image_size", "epochs", "batch_size", "lr"),
        *("device", "resume"),
    )

    train: str
    out: str
    val: str | None = None
    model: str | None = None
    init: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    fraction: float = 1.0
    seed: int = 0
    detector: str = "conditional-detr"
    backbone: str = "efficientnet-lite0"
    num_queries: int | None = None
    hidden_size: int | None = None
    heads: int | None = None
    encoder_layers: int | None = None
    decoder_layers: int | None = None
    ffn_size: int | None = None
    dropout: float | None = None
    attention_dropout: float | None = None
    activation_dropout: float | None = None
    detector_options: dict[str, Value] = field(default_factory=dict)
    epochs: float = 50
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float = 1e-4
    backbone_lr: float = 5e-5
    freeze: list[str] = field(default_factory=list)
    weight_decay: float = 1e-4
    schedule: Literal["step", "constant", "cosine", "one-cycle"] = "step"
    drop_at: float = 0.8
    warmup: int = 0
    clip: float = 0.1
    image_size: int | None = None
    max_size: int | None = None
    min_size: int | None = None
    square: bool | None = None
    augment: Literal["light", "strong"] = "light"
    crop: float = 0.5
    flip: float = 0.5
    colour_jitter: float = 0.1
    eval_every: float = 1
    patience: int = 0
    ema: float = 0.0
    eval_batch_size: int | None = None
    workers: int | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    kernels: Literal["auto", "off", "hub"] = "auto"
    save_every: int | None = None
    keep: int = 2
    log_every: int = 10
    max_bad_share: float = 0.05
    progress: bool = True
    resume: bool = False
    replay: str | None = None
    report_to: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raise :class:`UserError` for values that no type can refuse."""
        if self.model is not None and self.init is not None and self.model != self.init:
            raise UserError("model and init both say where to start from: give one of them")
        counts = ("batch_size", "accumulate", "epochs", "steps", "log_every", "save_every", "eval_batch_size")
        sides = ("max_size", "min_size")
        check_numbers(
            self,
            positive=(*counts, *sides, *(name for name in SIZES if name not in DROPOUTS)),
            not_negative=(
                *("lr", "backbone_lr", "weight_decay", "clip", "warmup"),
                *("eval_every", "workers", "seed", "keep"),
            ),
            shares=("crop", "flip", "drop_at", "colour_jitter", "max_bad_share", *DROPOUTS),
        )
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.image_size is not None and self.image_size < 32:
            raise UserError(f"image_size must be at least 32 pixels, is {self.image_size}")
        if self.min_size is not None and self.image_size is not None and self.min_size > self.image_size:
            raise UserError(f"min_size {self.min_size} is above image_size {self.image_size}")

    def changes(self, before: dict[str, Any]) -> list[str]:
        """Settings that differ from those a run began with and would change its updates, as ``name: old -> new``."""
        return [
            f"{name}: {before[name]} -> {value}"
            for name, value in dataclasses.asdict(self).items()
            if name not in MAY_CHANGE and name in before and before[name] != value
        ]

    def sizes(self) -> dict[str, Any]:
        """The detector's sizes and options that are given."""
        return given(self, SIZES) | self.detector_options

    def dropouts(self) -> dict[str, Any]:
        """The dropout probabilities that are given."""
        return given(self, DROPOUTS)

    def transform(self, size: InputSize) -> TransformConfig:
        """The augmentation for detectors of this input size."""
        from siamese_detr.training.labelled_dataset import TransformConfig

        return TransformConfig(
            image_size=size.shortest_edge,
            max_size=size.longest_edge,
            min_size=self.min_size,
            square=size.square,
            crop=self.crop,
            flip=self.flip,
            colour_jitter=self.colour_jitter,
            strong=self.augment == "strong",
        )

    def square_sides(self, size: InputSize, unit: int) -> list[int]:
        """The sides, in pixels, that training draws from for each batch of squares; of others there are none."""
        if not size.square or self.min_size is None:
            return []
        return [side for side in range(self.min_size, size.shortest_edge + 1) if side % unit == 0]

    def input_size(self, detector: DetectorAdapter) -> InputSize:
        """The size of evaluation: what the configuration says, else what the detector was made for.

        Raises:
            UserError: the detector's family does not take this size.
        """
        from siamese_detr.training.labelled_dataset import InputSize

        own = detector.input_size
        side = detector.square_side
        square = (
            self.square
            if self.square is not None
            else side is not None or (self.image_size is None and "height" in own)
        )
        short = self.image_size or own.get("shortest_edge") or own.get("height") or 800
        if side is not None and (not square or short % side):
            nearest = max(side, side * round(short / side))
            raise UserError(
                f"{detector.family} takes square images of multiples of {side} only: use image_size {nearest}, square"
            )
        if self.max_size is not None:
            long = self.max_size
        elif self.image_size is None and "longest_edge" in own:
            long = own["longest_edge"]
        else:
            long = round(short * 1333 / 800)
        if long < short:
            raise UserError(f"max_size {long} is below image_size {short}")
        if self.min_size is not None and self.min_size > short:
            raise UserError(f"min_size {self.min_size} is above the image size of {short}")
        return InputSize(short, long, square)

    def total_steps(self, images: int) -> int:
        """Updates of the whole run on so many training images."""
        return self.steps if self.steps is not None else max(1, round(self.epochs * images / self.batch_size))

    def evaluations(self, images: int) -> int:
        """How many there are, evenly over the run, the last at its end."""
        steps, every = self.total_steps(images), self.eval_every * images / self.batch_size
        return min(steps, max(1, round(steps / every)) if every else 1)
