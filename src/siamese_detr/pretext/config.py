"""The options of the pretext tasks, and the facts about each. Nothing here loads PyTorch, so ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from siamese_detr.config import Options, check_numbers
from siamese_detr.errors import UserError


@dataclass(kw_only=True)
class PretextConfig(Options):
    """The losses that all methods share.

    A subclass adds a method's own options and the facts about it.

    Facts (class variables, not options):
        task: ``module:Class`` of the :class:`.base.Pretext` it configures, which is imported when a run begins.
        title: the method's name in reports.
        view_kind: what a sample shows: "two" views of an image, one view with random "patches", or one view with the
            best object "proposals".
        paper_regions: regions per image in the paper.
        paper_proposals: how the paper computes object proposals (``--proposal-method``); None if it uses none.

    Args:
        class_weight: weight of the class loss.
        box_weight: weight of the L1 box loss.
        giou_weight: weight of the GIoU loss.
        class_cost: weight of the object probability in the matching cost.
        box_cost: weight of the L1 distance in the matching cost.
        giou_cost: weight of the GIoU in the matching cost.
        no_object_weight: weight of unmatched queries in the class loss.
    """

    task: ClassVar[str]
    title: ClassVar[str]
    view_kind: ClassVar[Literal["two", "patches", "proposals"]]
    paper_regions: ClassVar[int]
    paper_proposals: ClassVar[str | None]

    class_weight: float = 1.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    class_cost: float = 1.0
    box_cost: float = 5.0
    giou_cost: float = 2.0
    no_object_weight: float = 0.1

    def check(self) -> None:
        check_numbers(
            self,
            not_negative=(
                *("class_weight", "box_weight", "giou_weight", "class_cost", "box_cost", "giou_cost"),
                "no_object_weight",
            ),
        )

    @property
    def needs_crops(self) -> bool:
        """Whether batches must hold the regions' crops."""
        return True

    @property
    def class_names(self) -> list[str] | None:
        """Classes of the task's own, which the detector is to have; None: its class heads do not learn."""
        return None


@dataclass(kw_only=True)
class SiameseConfig(PretextConfig):
    """Siamese DETR's losses and ablations; the defaults are the paper's for Conditional DETR on ImageNet.

    Args:
        lambda_region: weight of region discrimination (paper: 5 Conditional, 3 others and COCO).
        lambda_global: weight of global discrimination (paper: 10; 0.3 on COCO).
        discrimination: which of the two is learned: none, region, global or both.
        region_target: where a region's feature comes from: its crop (the paper), or RoIAlign of the view (saves the
            crops).
        target_view: the view of that feature: the query's own (the paper), or the other one, in which the query
            searches.
        cross_view: decode a view's regions on the other view's memory (the paper); off: on its own, the single-view
            ablation.
        jitter_queries: pool the queries' features at jittered boxes (the paper) rather than at the regions themselves.
        region_dropout: probability with which a training step shows an image's queries none of its regions (the paper:
            0): the learned queries alone then have to find them, as they have to find objects in fine-tuning.
        pool_padding: let padding into the pooled features, as the paper's code does: averaged into the global ones, and
            at the picture's edge interpolated into the regions'. Off: only the picture counts.
        global_levels: which levels of the encoder output the global features pool: all, or those of the backbone's maps
            alone, as the paper's code does (it differs in Deformable DETR, which adds a level of its own).
        global_hidden_size: width of the global projector.
        global_size: width of the global projection and prediction.
        global_predictor_size: width of the global predictor's inner layer.
    """

    task = "siamese_detr.pretext.siamese:SiamesePretext"
    title = "Siamese DETR"
    view_kind = "two"
    paper_regions = 10
    paper_proposals = "edge-boxes"

    lambda_region: float = 5.0
    lambda_global: float = 10.0
    discrimination: Literal["none", "region", "global", "both"] = "both"
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

    def check(self) -> None:
        widths = ("global_hidden_size", "global_size", "global_predictor_size")
        check_numbers(self, positive=widths, not_negative=("lambda_region", "lambda_global"))
        if not 0 <= self.region_dropout < 1:
            raise UserError(f"region_dropout must be at least 0 and below 1, not {self.region_dropout}")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        if not self.learns_regions:
            yield ("lambda_region", "region_target", "target_view"), f"discrimination is {self.discrimination}"
        if not self.learns_globally:
            names = ("lambda_global", "global_levels", "global_hidden_size", "global_size", "global_predictor_size")
            yield names, f"discrimination is {self.discrimination}"

    @property
    def learns_regions(self) -> bool:
        """Whether L_region is computed."""
        return self.discrimination in ("region", "both")

    @property
    def learns_globally(self) -> bool:
        """Whether L_global is computed."""
        return self.discrimination in ("global", "both")

    @property
    def needs_crops(self) -> bool:
        return self.learns_regions and self.region_target == "crop"


@dataclass(kw_only=True)
class UpDetrConfig(PretextConfig):
    """UP-DETR's losses; the defaults are the paper's.

    Args:
        reconstruction_weight: weight of the reconstruction of the patch feature.
        patch_dropout: probability with which a query of a training step goes without its patch (§3.2).
    """

    task = "siamese_detr.pretext.up_detr:UpDetrPretext"
    title = "UP-DETR"
    view_kind = "patches"
    paper_regions = 10
    paper_proposals = None

    reconstruction_weight: float = 1.0
    patch_dropout: float = 0.1

    def check(self) -> None:
        check_numbers(self, not_negative=("reconstruction_weight",))
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout must be at least 0 and below 1, not {self.patch_dropout}")


@dataclass(kw_only=True)
class DetRegConfig(PretextConfig):
    """DETReg's losses; the defaults are the paper's.

    Args:
        embedding_weight: weight of the object embedding loss.
    """

    task = "siamese_detr.pretext.detreg:DetRegPretext"
    title = "DETReg"
    view_kind = "proposals"
    paper_regions = 30
    paper_proposals = "selective-search"

    embedding_weight: float = 1.0

    def check(self) -> None:
        check_numbers(self, not_negative=("embedding_weight",))


@dataclass(kw_only=True)
class ClustersConfig(PretextConfig):
    """Detection of k-means classes.

    Args:
        classes: number of clusters of the regions' features (clusters alone).
    """

    task = "siamese_detr.pretext.clusters:ClustersPretext"
    title = "k-means classes"
    view_kind = "proposals"
    paper_regions = 10
    paper_proposals = "edge-boxes"

    classes: int = 64

    def check(self) -> None:
        if self.classes < 2:
            raise UserError(f"classes must be at least 2, not {self.classes}")

    def idle(self) -> Iterator[tuple[tuple[str, ...], str]]:
        weights = tuple(field.name for field in fields(PretextConfig))
        yield weights, "the method clusters has the losses of the detector's family"

    @property
    def class_names(self) -> list[str]:
        return [f"cluster {number}" for number in range(self.classes)]
