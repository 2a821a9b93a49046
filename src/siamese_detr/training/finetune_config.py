"""The options of ``finetune``: those of the components it uses, and its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from siamese_detr.config import check_numbers
from siamese_detr.detectors.structures import DetectorOptions
from siamese_detr.errors import UserError
from siamese_detr.training.optimizer import OptimizerConfig
from siamese_detr.training.run_config import RunConfig

if TYPE_CHECKING:  # load PyTorch, for which --help need not wait
    from siamese_detr.detectors.adapter import DetectorAdapter
    from siamese_detr.training.labelled_dataset import InputSize, TransformConfig

SELF_TRAINING_NEEDS = "self-training on unlabelled images needs validation labels (val) and averaged weights (ema)"


@dataclass
class FinetuneConfig(RunConfig, OptimizerConfig, DetectorOptions):
    """Fine-tune a detector on labelled images: from a pre-trained one (--model), or from scratch.

    OUT/best and OUT/last are Hugging Face directories. Killed at any moment, the same command with --resume continues
    exactly. On SIGTERM or SIGUSR1 the run saves itself and exits with code 75.

    Args:
        train: labels to learn from: COCO JSON, VOC folder or YOLO data.yaml; or several, such as your own and those
            that ``predict --labels`` wrote. Classes are united by name; of an image labelled by hand, pseudo-labels are
            left out.
        out: run directory: best/ and last/ (Hugging Face detectors), metrics.json, history.jsonl, log.jsonl,
            tensorboard/.
        val: labels to evaluate on; default: those of TRAIN, where it has a split for it (a data.yaml, Roboflow's
            folders); none: do not measure. Without any only last/ is written.
        model: where to start from: a run, a Hugging Face directory of a known family, a name on the Hub, or a .pth of
            the papers' codes; the class head is re-made for the labels' classes, everything else kept. Without it the
            detector starts from scratch.
        init: another name for model.
        kept_share: share of the weights that a MODEL pre-trained without labels keeps, 0 to 1; the rest comes from new
            initial values (shrink and perturb: Ash and Adams 2020). A MODEL with classes keeps all.
        train_images: folder of the training images, where it is not the usual one.
        val_images: folder of the validation images, where it is not the usual one.
        unlabelled: further images (folder, list, COCO JSON or shards) for self-training: what the averaged detector
            finds in them becomes their labels. Needs VAL and EMA.
        burn_in: share of the run before self-training begins, at the next evaluation (0: at once, for a MODEL that was
            fine-tuned before).
        pseudo_threshold: score from which what was found becomes a label; default: for each class, that of highest F1
            on the validation images.
        fraction: part of the training images to use, above 0 to 1; reproducible, and with every class in it.
        repeat_factor: show images of classes that a smaller share of the images than this has more often, 0 to 1 (LVIS:
            0.001; 0: all alike).
        patience: stop after so many evaluations without a higher AP (0: never).
        ema: average the weights over steps with at most this decay, 0 to 1 (0: do not); the averages are what is
            evaluated and saved.
        backbone_lr: learning rate of the backbone; 0: frozen, and run without gradients.
        layer_decay: each block of a vision transformer learns at this share of the next one's rate, above 0 to 1 (0.7
            is usual; 1: all at backbone_lr).
        freeze: parts that do not learn, by the names of modules: encoder, decoder, backbone, blocks.0, ...
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
        pages: draw augmented training photos with their boxes into OUT/augmented.jpg before training; the command, run
            as one process, also writes OUT/report.html at the end.
    """

    COMMON: ClassVar = (
        *("train", "out", "val", "model", "train_images", "fraction", "image_size", "epochs", "batch_size", "lr"),
        *("device", "resume"),
    )
    MAY_CHANGE: ClassVar = RunConfig.MAY_CHANGE | {
        *("eval_batch_size", "eval_every", "pages"),
        *("train", "val", "train_images", "val_images", "model", "init"),  # whose content is compared
    }

    train: str | tuple[str, ...]
    out: str
    val: str | None = None
    model: str | None = None
    _: KW_ONLY
    init: str | None = None
    kept_share: float = 1.0
    train_images: str | None = None
    val_images: str | None = None
    unlabelled: str | None = None
    burn_in: float = 0.5
    pseudo_threshold: float | None = None
    fraction: float = 1.0
    repeat_factor: float = 0.0
    epochs: float | Literal["auto"] = "auto"
    batch_size: int = 16
    backbone_lr: float = 5e-5
    layer_decay: float = 1.0
    freeze: tuple[str, ...] = ()
    drop_at: float = 0.8
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
    pages: bool = True
    save_every: int | None = None

    def check(self) -> None:
        if not isinstance(self.train, str) and len(self.train) == 1:
            (self.train,) = self.train
        if self.model is not None and self.init is not None and self.model != self.init:
            raise UserError("model and init both say where to start from: give one of them")
        check_numbers(
            self,
            positive=("max_size", "min_size", "eval_batch_size", "layer_decay"),
            not_negative=("backbone_lr", "eval_every"),
            shares=(
                *("kept_share", "burn_in", "pseudo_threshold", "crop", "flip", "colour_jitter", "ema", "layer_decay"),
                *("repeat_factor",),
            ),
        )
        if self.unlabelled is not None and (not self.may_validate or not self.ema):
            raise UserError(SELF_TRAINING_NEEDS)
        if self.image_size is not None and self.image_size < 32:
            raise UserError(f"image_size must be at least 32 pixels, is {self.image_size}")
        if self.min_size is not None and self.image_size is not None and self.min_size > self.image_size:
            raise UserError(f"min_size {self.min_size} is above image_size {self.image_size}")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.backbone_lr:
            yield ("layer_decay",), "the backbone is frozen (backbone_lr 0)"
        if self.start is None:
            yield ("kept_share",), "the detector starts from scratch"
        if not self.may_validate:
            yield ("val_images", "eval_every", "eval_batch_size", "patience"), "there are no validation labels (val)"
        if self.unlabelled is None:
            yield ("burn_in", "pseudo_threshold"), "there are no unlabelled images"
        if self.square:
            yield ("max_size",), "images are squares of image_size"
        if self.augment == "strong":
            yield ("crop", "colour_jitter"), "augment is strong"

    @property
    def sources(self) -> tuple[str, ...]:
        """The label sources to learn from."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def may_validate(self) -> bool:
        """Whether there may be validation labels: where ``val`` is not given, those of a JSON have no split for it."""
        may_split = not all(source.lower().endswith(".json") for source in self.sources)
        return self.val != "none" and (self.val is not None or may_split)

    def find_validation(self) -> bool:
        """Let ``val`` be the validation split of the training labels, if they have one and no other labels are given.

        Returns:
            whether there are validation labels.

        Raises:
            UserError: there are none, and self-training needs them.
        """
        from siamese_detr.images.labels import has_split

        if self.val is None:
            self.val = next((source for source in self.sources if has_split(source, "val")), None)
            self.val_images = self.val_images or self.train_images
        if self.val in (None, "none") and self.unlabelled is not None:
            raise UserError(SELF_TRAINING_NEEDS)
        return self.val not in (None, "none")

    @property
    def start(self) -> str | None:
        return self.model or self.init

    def usual_epochs(self, images: int) -> float:
        """The fewer the labels, the more passes they bear: 160 for 80 images, 72 for 400 (180 steps of 8 images times
        the root of their number, from trials on small sets), but at least the 12 of the short COCO schedule."""
        return max(12.0, 1440 / math.sqrt(images))

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

    def evaluations(self, images: int) -> int:
        """How many there are, evenly over the run, the last at its end."""
        steps, every = self.total_steps(images), self.eval_every * images / self.batch_size
        return min(steps, max(1, round(steps / every)) if every else 1)
