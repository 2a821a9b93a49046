"""The page of a pre-training run: views, regions, proposals, and the predictions of each decoder layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from siamese_detr.config import validate
from siamese_detr.detection.boxes import box_corners, iou
from siamese_detr.errors import ImageError, UserError
from siamese_detr.images.decode import read_image
from siamese_detr.images.listing import list_images
from siamese_detr.pretext.base import Pretext
from siamese_detr.pretext.losses import at_matches
from siamese_detr.proposals.shard import StoredImage
from siamese_detr.proposals.store import ProposalStore, Selection
from siamese_detr.randomness import seed_torch
from siamese_detr.reporting.page import Block, Figure, Grid, Heading, Missing, Page, Section, Table, Text
from siamese_detr.reporting.pictures import COLOURS, Album, Box, Photo
from siamese_detr.reporting.runs import located, log_section, read_config, what_was_run
from siamese_detr.runtime import checkpoint as checkpoints
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.training.pretrain import build
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.views.batch import prepare
from siamese_detr.views.two_views import TwoViewDataset, ViewSample, collate

SHOWN_PROPOSALS = 15


@dataclass(frozen=True)
class Predicted:
    """The boxes that each decoder layer predicts for the regions of some images, on the CPU.

    Args:
        boxes: (layers, V, B, P, 4) xyxy pixels of the view.
        iou: (layers, V, B, P) IoU with the regions; NaN for padding.
    """

    boxes: Tensor
    iou: Tensor


def pretraining_page(run: Path, samples: int, device: str) -> Page:
    """The page of the pre-training run in ``run``, with ``samples`` images; ``device`` computes the predictions."""
    values = read_config(run)
    album = Album()
    log = [record for record in JsonLines(run / "log.jsonl").read() if "loss" in record]
    start = ("init",) if values.get("init") else ("detector", "backbone")
    facts = {name: str(values.get(name)) for name in ("method", *start, "images", "batch_size", "seed")}
    facts["steps"] = str(log[-1]["step"]) if log else "none logged"
    sections = [what_was_run(run, facts, values), log_section(run)]
    try:
        config = validate(PretrainConfig.variant(values), located(run, values), str(run / "config.yaml"))
        images = stored_images(run, config)
    except UserError as error:
        sections.append(Section("Views and proposals", [Missing("Views, proposals and predictions", str(error))]))
    else:
        views = [sample for sample in sample_views(images, config, samples) if sample.images is not None]
        photos = [[album.add(view) for view in sample.images] for sample in views]  # type: ignore[union-attr]
        if views:
            sections += [
                Section("Views and their regions", view_blocks(views, photos, config.cross_view)),
                Section("Proposals", proposal_blocks(images, [sample.index for sample in views], album)),
                Section("What the decoder predicts", decoder_blocks(run, config, views, photos, device)),
            ]
        else:
            unreadable = Missing("Views, proposals and predictions", "none of the sampled images could be read")
            sections.append(Section("Views and proposals", [unreadable]))
    title = f"Pre-training: {values.get('method')} on {values.get('detector', values.get('init'))}"
    summary = "Nothing was logged yet."
    if log:
        first, last = log[0], log[-1]
        summary = f"{last['step']} steps; the loss went from {first['loss']:.3g} to {last['loss']:.3g}."
    return Page(title, summary, sections, album.markup())


def stored_images(run: Path, config: PretrainConfig) -> Selection:
    """The run's images with their proposals (all images of the store if the list of images is missing)."""
    store = ProposalStore.open(config.proposals or run / "proposals")
    try:
        return Selection(store, store.select(list_images(config.images)))
    except UserError:
        return Selection(store, np.arange(len(store)))


def sample_views(images: Selection, config: PretrainConfig, samples: int) -> list[ViewSample]:
    """Views of images at equal distances in the list, as in the first epoch."""
    dataset = TwoViewDataset(images, config.views(), config.seed)
    chosen = np.unique(np.linspace(0, len(images) - 1, min(samples, len(images))).round().astype(int))
    return [dataset[(0, number)] for number in chosen.tolist()]


def region_boxes(sample: ViewSample, view: int) -> list[Box]:
    """The regions of one view, numbered, without padding."""
    assert sample.plan is not None
    boxes = sample.plan.boxes[view]
    count = len(boxes) - sample.plan.padded
    return [Box(boxes[p].tolist(), COLOURS[p % len(COLOURS)], str(p + 1)) for p in range(count)]


def view_blocks(views: list[ViewSample], photos: list[list[Photo]], cross_view: bool) -> list[Block]:
    two = len(photos[0]) > 1
    blocks: list[Block] = [
        Text(
            "Two overlapping views of each image in the first epoch, before photometric augmentation. The same number "
            "and colour mark the same region; region 1 is the views' intersection. The detector gets the features "
            f"of the regions of one view and learns to find the regions in {'the other' if cross_view else 'it'}."
            if two
            else "The view of each image in the first epoch and its regions, before photometric augmentation."
        )
    ]
    for number, (sample, row) in enumerate(zip(views, photos, strict=True), 1):
        figures = []
        for view, photo in enumerate(row):
            boxes = region_boxes(sample, view)
            alt = f"Image {number}, view {view + 1} of {len(row)}, with {len(boxes)} numbered regions."
            padded = f", {sample.plan.padded} padded" if sample.plan and sample.plan.padded else ""
            figures.append(photo.draw(boxes, alt, f"Image {number}, view {view + 1}: {len(boxes)} regions{padded}"))
        blocks.append(Grid(figures, 420))
    return blocks


def proposal_blocks(images: Selection, chosen: list[int], album: Album) -> list[Block]:
    figures: list[Figure] = []
    for number, index in enumerate(chosen, 1):
        image: StoredImage = images.row(index)
        try:
            pixels = read_image(image.path, min_side=album.longest)
        except ImageError as error:
            return [Missing("Proposals", str(error))]
        boxes = [Box(x.tolist(), COLOURS[i % len(COLOURS)]) for i, x in enumerate(image.boxes[:SHOWN_PROPOSALS])]
        alt = f"Image {number} with its {len(boxes)} best proposals of {len(image.boxes)}."
        caption = f"Image {number}: the best {len(boxes)} of {len(image.boxes)}"
        figures.append(album.add(pixels, (image.width, image.height)).draw(boxes, alt, caption))
    about = (
        "Boxes that may contain an object of any class, computed once before training by "
        f"{images.store.settings.method}. The regions above are chosen from the best of them."
    )
    return [Text(about), Grid(figures, 260)]


def decoder_blocks(
    run: Path, config: PretrainConfig, views: list[ViewSample], photos: list[list[Photo]], device: str
) -> list[Block]:
    try:
        before = initial_pretext(config)
        after = trained_pretext(run, before)
    except UserError as error:
        return [Missing("Predictions before and after", str(error))]
    predictions = {
        when: predict_regions(pretext.to(device), config, views)
        for when, pretext in (("before", before), ("after", after))
    }
    two = len(photos[0]) > 1
    asked = f"the regions of view {1 if config.cross_view else 2}, in view 2" if two else "the regions, in the view"
    blocks: list[Block] = [
        Text(
            f"The boxes that each decoder layer predicts for {asked}, with the initial weights (built again from "
            "configuration and seed) and with the pre-trained ones. Dashed: the region; solid: the prediction matched "
            "to it. IoU is the area of their intersection divided by the area of their union: 1 is a perfect fit."
        ),
        iou_table(predictions),
    ]
    view = len(photos[0]) - 1
    for number, (sample, row) in enumerate(zip(views, photos, strict=True)):
        for when, result in predictions.items():
            blocks.append(Heading(f"Image {number + 1}, {when} pre-training"))
            blocks.append(Grid(layer_figures(sample, row[view], result, view, number, when), 240))
    return blocks


def layer_figures(
    sample: ViewSample, photo: Photo, predicted: Predicted, view: int, number: int, when: str
) -> list[Figure]:
    targets = region_boxes(sample, view)
    figures = []
    for layer in range(len(predicted.boxes)):
        boxes = predicted.boxes[layer, view, number].tolist()
        drawn = [Box(boxes[p], t.colour, t.tag) for p, t in enumerate(targets)]
        drawn += [Box(t.xyxy, t.colour, dashed=True) for t in targets]
        overlap = mean(predicted.iou[layer, view, number])
        alt = f"Image {number + 1}, layer {layer + 1}, {when} pre-training: mean IoU {overlap:.2f} with the regions."
        figures.append(photo.draw(drawn, alt, f"Layer {layer + 1}: IoU {overlap:.2f}"))
    return figures


def iou_table(predictions: dict[str, Predicted]) -> Table:
    rows = [[f"{when} pre-training", *(f"{mean(overlap):.3f}" for overlap in p.iou)] for when, p in predictions.items()]
    headers = ["weights", *(f"layer {layer + 1}" for layer in range(len(predictions["before"].iou)))]
    return Table("Mean IoU of predictions and regions, over all views of the images shown", headers, rows)


def mean(overlap: Tensor) -> float:
    """Mean over real regions; 0 if there is none."""
    values = overlap[~overlap.isnan()]
    return float(values.mean()) if len(values) else 0.0


def initial_pretext(config: PretrainConfig) -> Pretext:
    """The pretext task with its initial weights: the same seed gives the same weights."""
    with torch.random.fork_rng():
        seed_torch(config.seed)
        return build(config).eval()


def trained_pretext(run: Path, initial: Pretext) -> Pretext:
    """The pretext task with the weights of the newest checkpoint.

    Raises:
        UserError: there is no checkpoint, or it is of another detector.
    """
    checkpoint = checkpoints.latest_valid(run / "checkpoints", report=lambda message: None)
    if checkpoint is None:
        raise UserError(
            f"{run / 'checkpoints'} holds no checkpoint, and only checkpoints contain the heads of the pretext task"
        )
    trained = copy.deepcopy(initial)
    try:
        trained.load_state_dict(checkpoints.read_tensors(checkpoint, "model"))
    except RuntimeError as error:
        raise UserError(f"{checkpoint} is of another detector: {str(error).splitlines()[-1].strip()}") from error
    return trained


@torch.no_grad()
def predict_regions(pretext: Pretext, config: PretrainConfig, views: list[ViewSample]) -> Predicted:
    """Let ``pretext`` predict the regions of ``views``, augmented as in the first epoch."""
    detector = pretext.detector
    device = next(detector.parameters()).device
    batch: Any = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in collate(views).items()}
    inputs = prepare(batch, detector.image_mean, detector.image_std, config.crop_size if pretext.needs_crops else None)
    features = pretext.frozen_features(inputs)
    _, decoded = pretext.predict(features)
    matched = pretext.match(decoded, features)
    boxes: Any = at_matches(decoded.boxes.unflatten(1, features.boxes.shape[:2]), matched.matches)
    sizes = features.sizes.unflatten(0, features.boxes.shape[:2])  # (V, B, 2): height, width
    boxes = box_corners(boxes) * sizes[:, :, None, [1, 0, 1, 0]].to(boxes.dtype)
    regions = features.boxes.to(boxes.dtype).expand_as(boxes)
    overlap = iou(boxes, regions).cpu()
    count = torch.tensor([len(s.plan.boxes[0]) - s.plan.padded for s in views if s.plan is not None])
    padding = torch.arange(overlap.shape[-1]) >= count[:, None]
    return Predicted(boxes.cpu(), overlap.masked_fill(padding, float("nan")))
