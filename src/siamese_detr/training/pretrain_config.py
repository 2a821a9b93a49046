"""The options of ``pretrain``: those of the components it uses, and its own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, fields, make_dataclass
from typing import Any, ClassVar

from siamese_detr.config import check_numbers
from siamese_detr.detectors.structures import DetectorOptions
from siamese_detr.errors import UserError
from siamese_detr.pretext import (
    PRETEXTS,
    ClustersConfig,
    DetRegConfig,
    PretextConfig,
    SiameseConfig,
    UpDetrConfig,
    find_pretext,
)
from siamese_detr.training.optimizer import OptimizerConfig
from siamese_detr.training.run_config import RunConfig
from siamese_detr.views.config import ViewConfig, ViewOptions


@dataclass
class PretrainConfig(  # type: ignore[misc]  # of the methods, only the chosen one's facts count: see `pretext`
    RunConfig, OptimizerConfig, DetectorOptions, ViewOptions, SiameseConfig, UpDetrConfig, DetRegConfig, ClustersConfig
):
    """Pre-train a detector's Transformer on unlabelled images (Siamese DETR, UP-DETR, DETReg or k-means classes).

    OUT/detector is what `siamese-detr finetune --model OUT` and `transformers` load. Killed at any moment, the same
    command with --resume continues exactly. On SIGTERM or SIGUSR1 the run saves itself and exits with code 75.

    Args:
        images: folder (searched recursively), list file (.txt) or COCO JSON.
        out: run directory: config.yaml, log.jsonl, tensorboard/, checkpoints/, detector/ (a Hugging Face directory).
        proposals: proposal store; computed first into OUT/proposals if not given (random boxes where none are used).
        proposal_method: how: edge-boxes, selective-search, random, or one that a plug-in adds.
        method: siamese, up-detr, detreg, clusters, or one that a plug-in adds.
        init: detector to start from, any that finetune takes: of any family, and of its own sizes.
        num_regions: regions per image (default: the method's).
        crop_size: side of the regions' crops, pixels.
        feature_bank: compute the frozen features of this many view sets per image once, and train on those (0: fresh
            views, always). Needs view_size; the size is reported first, and checked against the free space.
        bank_dir: where feature banks are kept; runs that share it share banks (default: OUT/feature_bank, until the run
            is done).
        keep_bank: keep OUT/feature_bank when the run is done.
        compile: use torch.compile.
        checkpoint_activations: recompute activations in the backward pass, to save memory.
    """

    COMMON: ClassVar = (
        *("images", "out", "proposals", "method", "detector", "backbone", "init", "steps", "epochs", "batch_size"),
        *("lr", "device", "resume"),
    )
    MAY_CHANGE: ClassVar = RunConfig.MAY_CHANGE | {
        *("bank_dir", "keep_bank", "checkpoint_activations"),
        *("images", "proposals", "init"),  # whose content is compared
    }

    images: str
    out: str
    proposals: str | None = None
    _: KW_ONLY
    proposal_method: str = "edge-boxes"
    method: str = "siamese"
    init: str | None = None
    num_regions: int | None = None
    crop_size: int = 128
    feature_bank: int = 0
    bank_dir: str | None = None
    keep_bank: bool = False
    compile: bool = False
    checkpoint_activations: bool = False

    def check(self) -> None:
        check_numbers(self, positive=("num_regions", "crop_size", "lr"), not_negative=("feature_bank",))
        find_pretext(self.method)
        if self.feature_bank and self.view_size is None:
            raise UserError("feature_bank needs views of one size: give view_size")

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type[PretrainConfig]:
        method = values.get("method")
        return cls if method is None or method in PRETEXTS else with_options(find_pretext(method))  # type: ignore[arg-type]  # a class can be hashed

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        kind = find_pretext(self.method)
        own = names(kind)
        for method, other in PRETEXTS.items():
            yield tuple(names(other) - own), f"it is an option of {method}, and the method is {self.method}"
        yield from self.unread(kind.view_kind)
        if not self.pretext().needs_crops:
            yield ("crop_size",), "no crops are used"
        if self.proposals is not None:
            yield ("proposal_method",), "the boxes are those of proposals"
        elif not self.uses_proposals:
            yield ("proposal_method",), "no proposals are used"
        if not self.feature_bank:
            yield ("bank_dir", "keep_bank"), "feature_bank is 0"
        if self.bank_dir is not None:
            yield ("keep_bank",), "banks in bank_dir are kept"

    @property
    def start(self) -> str | None:
        return self.init

    @property
    def uses_proposals(self) -> bool:
        """Whether the boxes of a store matter, and not only its images."""
        return find_pretext(self.method).paper_proposals is not None and self.box_source == "proposals"

    @property
    def regions(self) -> int:
        """Regions per image."""
        return self.num_regions or find_pretext(self.method).paper_regions

    def usual_epochs(self, images: int) -> float:
        """As many as show 12,000 images (1,200 updates of 10), but at least 3."""
        return max(3.0, 12_000 / images)

    def check_queries(self, queries: int) -> None:
        """Raise UserError if a detector of so many queries has fewer than there are regions."""
        if self.regions > queries:
            raise UserError(
                f"too few queries for the number of regions: {queries} queries, {self.regions} regions; "
                "raise num_queries or lower num_regions"
            )

    def views(self) -> ViewConfig:
        """What decides the views."""
        shared = {name: getattr(self, name) for name in names(ViewOptions)}
        return ViewConfig(views=find_pretext(self.method).view_kind, num_regions=self.regions, **shared)

    def pretext(self) -> PretextConfig:
        """What the method reads."""
        kind = find_pretext(self.method)
        return kind(**{name: value for name, value in vars(self).items() if name in names(kind)})


def names(kind: type[Any]) -> set[str]:
    return {field.name for field in fields(kind)}


@functools.cache
def with_options(kind: Any) -> type[PretrainConfig]:
    """The configuration with the options of a plug-in's method, a :class:`PretextConfig`, as well."""
    return make_dataclass(PretrainConfig.__name__, [], bases=(kind, PretrainConfig), kw_only=True)
