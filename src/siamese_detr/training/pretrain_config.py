"""Everything ``pretrain`` can be told, flat, and how it divides into the parts' own configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from siamese_detr.config import check_numbers
from siamese_detr.errors import UserError
from siamese_detr.pretext import PretextConfig, find_pretext
from siamese_detr.training.sizes import DROPOUTS, SIZES, given
from siamese_detr.views.config import ViewConfig

Value = int | float | bool | str

MAY_CHANGE = {
    *("resume", "replay", "workers", "device", "progress", "report_to", "save_every", "keep", "log_every"),
    *("out", "steps", "epochs", "max_bad_share", "compile", "kernels", "bank_dir", "checkpoint_activations"),
    *("images", "proposals", "init"),  # whose content is compared
}
"""What a resumed run may be told otherwise than before: it does not change what an update computes, but ``steps`` and
``epochs`` what the learning rate's schedule has left."""


@dataclass
class PretrainConfig:
    """Pre-train a detector's Transformer on unlabelled images (Siamese DETR, UP-DETR or DETReg).

    OUT/detector is what `siamese-detr finetune --model OUT` and `transformers` load. Killed at any moment, the same
    command with --resume continues exactly. On SIGTERM or SIGUSR1 the run saves itself and exits with code 75.

    Args:
        images: folder (searched recursively), list file (.txt) or COCO JSON.
        out: run directory: config.yaml, log.jsonl, tensorboard/, checkpoints/, detector/ (a Hugging Face directory).
        proposals: proposal store; computed first into OUT/proposals if not given (random boxes where none are used).
        proposal_method: how: edge-boxes, selective-search, random, or one that a plug-in adds.
        resume: continue the run in OUT from its last valid checkpoint (or begin it).
        replay: nonfinite.json of a stopped run: do that step again and say what was not finite.
        method: siamese, up-detr or detreg.
        detector: detector family.
        backbone: efficientnet-lite0 (needs no network), a timm or Transformers name, a path to weights, random:NAME.
        init: Hugging Face directory of that family to start from (the sizes below are then its own, and so are the
            dropouts that are not given).
        num_queries: object queries; default: the family's, 100 or 300, like the following sizes.
        hidden_size: width of the Transformer.
        heads: attention heads.
        encoder_layers: depth of the encoder.
        decoder_layers: depth of the decoder.
        ffn_size: width of the feed-forward blocks.
        dropout: dropout probability; default: the family's, or the starting detector's.
        attention_dropout: dropout of attention weights, likewise.
        activation_dropout: dropout inside the feed-forward blocks, likewise.
        detector_options: further options of the family.
        short_sides: short side of the resized image, drawn uniformly.
        max_size: its long side at most.
        view_size: make every view a square of this side (default: keep aspect ratios and pad).
        flip: mirror the image with probability 0.5.
        area_range: area of the outer rectangle, share of the image (siamese).
        aspect_range: its width / height (siamese).
        iou: IoU of the two maximal views (siamese).
        shrink: move the views' outer corners inwards at random (siamese).
        diagonals: use both diagonals, and not always upper left and lower right as the paper (siamese).
        num_regions: regions per image (default: the method's).
        min_area: smallest region, share of the intersection (siamese).
        selection: top (best scored, the paper) or diverse (no near-duplicates, drawn anew each epoch); not of up-detr.
        duplicate_iou: diverse: regions that overlap more are near-duplicates.
        box_source: proposals or random; up-detr's are always random patches.
        box_jitter: how far edges of padding and query boxes move, share of width and height.
        brightness: strength of the colour jitter.
        contrast: strength of the colour jitter.
        saturation: strength of the colour jitter.
        hue: strength of the colour jitter, turns.
        color_probability: probability of the colour jitter.
        gray_probability: probability of greyscale.
        blur_probability: probability of Gaussian blur.
        blur_sigma: its standard deviation, pixels.
        crop_size: side of the regions' crops, pixels.
        feature_bank: compute the frozen features of this many view sets per image once, and train on those (0: fresh
            views, always). Needs view_size; the size is told beforehand, and checked against the free space.
        bank_dir: where feature banks are kept; runs that share it share banks (default: OUT/feature_bank).
        class_weight: weight of the class loss.
        box_weight: weight of the L1 box loss.
        giou_weight: weight of the GIoU loss.
        class_cost: weight of the object probability in matching.
        box_cost: weight of the L1 distance in matching.
        giou_cost: weight of the GIoU in matching.
        no_object_weight: weight of unmatched queries in the class loss.
        discrimination: none, region, global or both (siamese).
        lambda_region: weight of region discrimination (siamese).
        lambda_global: weight of global discrimination (siamese).
        region_target: crop (the paper) or roi: where region targets come from (siamese).
        target_view: own (the paper) or other: the view of the region targets (siamese).
        cross_view: decode regions in the other view (siamese).
        jitter_queries: pool the queries' features at jittered boxes (siamese).
        region_dropout: probability that an image's queries are shown none of its regions, as in fine-tuning (siamese).
        pool_padding: let padding into the global and region features, as the paper's code does (siamese).
        global_levels: levels the global feature pools: all, or backbone, those of the backbone's maps alone, as the
            paper's code does in multi-scale Deformable DETR (siamese).
        global_hidden_size: width of the global projector (siamese).
        global_size: width of the global projection (siamese).
        global_predictor_size: width of the global predictor's inner layer (siamese).
        reconstruction_weight: weight of the patch reconstruction (up-detr).
        patch_dropout: probability that a query goes without its patch (up-detr).
        embedding_weight: weight of the object embedding (detreg).
        steps: updates (default: what EPOCHS amount to).
        epochs: passes over the images; ignored where STEPS is given.
        batch_size: images per update, over all processes.
        accumulate: parts in which an update's images are processed, to save memory.
        lr: learning rate.
        weight_decay: of linear and convolutional weights.
        decay_all: decay norms, biases and embeddings too, as the paper's code does.
        clip: largest gradient norm.
        schedule: step (x 0.1 at DROP_AT), constant, cosine or one-cycle.
        drop_at: share of the run after which the rate drops.
        warmup: updates over which the rate grows.
        precision: fp32, bf16 or fp16.
        device: auto or cpu.
        compile: use torch.compile.
        kernels: auto exchanges modules for faster ones that compute the same; off exchanges none; hub also lets
            Transformers load kernels from the Hugging Face hub (needs the package kernels).
        checkpoint_activations: recompute activations in the backward pass, to save memory.
        seed: of everything random.
        workers: data processes per training process (default: all cores but one, at most 8).
        save_every: updates between checkpoints.
        keep: newest checkpoints that remain (0: all).
        log_every: updates between logs.
        max_bad_share: stop when a larger share of images cannot be read.
        progress: show a progress bar.
        report_to: further trackers (wandb, mlflow, ...).
    """

    COMMON = (
        *(
            "images",
            "out",
            "proposals",
            "method",
            "detector",
            "backbone",
            "init",
            "steps",
            "epochs",
            "batch_size",
            "lr",
        ),
        *("device", "resume"),
    )

    images: str
    out: str
    proposals: str | None = None
    proposal_method: str = "edge-boxes"
    resume: bool = False
    replay: str | None = None
    # the detector
    method: str = "siamese"
    detector: str = "conditional-detr"
    backbone: str = "efficientnet-lite0"
    init: str | None = None
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
    # the views
    short_sides: tuple[int, ...] = ViewConfig.short_sides
    max_size: int = ViewConfig.max_size
    view_size: int | None = None
    flip: bool = True
    area_range: tuple[float, float] = ViewConfig.area_range
    aspect_range: tuple[float, float] = ViewConfig.aspect_range
    iou: float = 0.5
    shrink: bool = True
    diagonals: bool = False
    num_regions: int | None = None
    min_area: float = 0.05
    selection: Literal["top", "diverse"] = "top"
    duplicate_iou: float = 0.8
    box_source: Literal["proposals", "random"] = "proposals"
    box_jitter: float = 0.1
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    color_probability: float = 0.8
    gray_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    crop_size: int = 128
    feature_bank: int = 0
    bank_dir: str | None = None
    # the losses
    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 1.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    no_object_weight: float = 0.1
    discrimination: Literal["none", "region", "global", "both"] = "both"
    lambda_region: float = 5.0
    lambda_global: float = 10.0
    region_target: Literal["crop", "roi"] = "crop"
    target_view: Literal["own", "other"] = "own"
    cross_view: bool = True
    jitter_queries: bool = True
    region_dropout: float = 0.0
    pool_padding: bool = False
    global_levels: Literal["all", "backbone"] = "all"
    global_hidden_size: int = 256
    global_size: int = 256
    global_predictor_size: int = 256
    reconstruction_weight: float = 1.0
    patch_dropout: float = 0.1
    embedding_weight: float = 1.0
    # the updates
    steps: int | None = None
    epochs: float = 100
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-4
    weight_decay: float = 1e-4
    decay_all: bool = False
    clip: float = 0.1
    schedule: Literal["step", "constant", "cosine", "one-cycle"] = "step"
    drop_at: float = 2 / 3
    warmup: int = 0
    # the run
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    kernels: Literal["auto", "off", "hub"] = "auto"
    checkpoint_activations: bool = False
    seed: int = 0
    workers: int | None = None
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    max_bad_share: float = 0.05
    progress: bool = True
    report_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UserError, naming the setting, for numbers that make no run."""
        losses = [f.name for f in dataclasses.fields(self) if f.name.endswith(("_weight", "_cost"))]
        counts = ("batch_size", "accumulate", "epochs", "steps", "save_every", "log_every", "num_regions", "crop_size")
        widths = ("global_hidden_size", "global_size", "global_predictor_size")
        check_numbers(
            self,
            positive=(*counts, *widths, "lr", *(name for name in SIZES if name not in DROPOUTS)),
            not_negative=(
                *("workers", "keep", "seed", "warmup", "clip", "weight_decay", "feature_bank"),
                *("lambda_region", "lambda_global", *losses),
            ),
            shares=("drop_at", "max_bad_share", *DROPOUTS),
        )
        if self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.feature_bank and self.view_size is None:
            raise UserError("feature_bank needs views of one size: give view_size")
        for name in ("patch_dropout", "region_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        self.views()

    @property
    def regions(self) -> int:
        """Regions per image."""
        return self.num_regions or find_pretext(self.method).paper_regions

    def check_queries(self, queries: int) -> None:
        """Raise UserError if a detector of so many queries has fewer than there are regions."""
        if self.regions > queries:
            raise UserError(
                f"too few queries for the number of regions: {queries} queries, {self.regions} regions; "
                "raise num_queries or lower num_regions"
            )

    def views(self) -> ViewConfig:
        """The views' part."""
        names = {f.name for f in dataclasses.fields(ViewConfig)} - {"views", "num_regions"}
        return ViewConfig(
            views=find_pretext(self.method).view_kind,
            num_regions=self.regions,
            **{name: getattr(self, name) for name in names},
        )

    def pretext(self) -> PretextConfig:
        """The pretext task's part."""
        kind = find_pretext(self.method)
        return kind(**{f.name: getattr(self, f.name) for f in dataclasses.fields(kind) if hasattr(self, f.name)})

    def sizes(self) -> dict[str, Any]:
        """The detector's sizes and options that are given."""
        return given(self, SIZES) | self.detector_options

    def total_steps(self, images: int) -> int:
        """Updates of the whole run on so many images."""
        if self.steps is not None:
            return self.steps
        return max(1, round(self.epochs * images / self.batch_size))

    def changes(self, before: dict[str, Any]) -> list[str]:
        """Settings that differ from those a run began with and would change its updates, as ``name: old -> new``."""
        plain = {
            name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items()
        }
        return [
            f"{name}: {before[name]} -> {value}"
            for name, value in plain.items()
            if name not in MAY_CHANGE and name in before and before[name] != value
        ]
