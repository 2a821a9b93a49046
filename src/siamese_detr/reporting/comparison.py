"""The page of a comparison: table, plots and all fine-tunings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from siamese_detr.comparison import plots
from siamese_detr.comparison.inits import Init, parse_init, short_names
from siamese_detr.comparison.luck import Difference, luck_lines
from siamese_detr.comparison.summary import CellResult, convergence_curves, label_curves, percent_of, summary_table
from siamese_detr.errors import ImageError, UserError
from siamese_detr.evaluation.coco import Detections, percent
from siamese_detr.evaluation.inference import DEFAULT_THRESHOLD
from siamese_detr.images.decode import read_image
from siamese_detr.images.labels import read_labels
from siamese_detr.pretext import find_pretext
from siamese_detr.reporting.charts import describe, inline
from siamese_detr.reporting.finetuning import labelled_objects, predicted_boxes
from siamese_detr.reporting.page import Block, Figure, Grid, Heading, Missing, Page, Section, Table, Text
from siamese_detr.reporting.pictures import Album, Box
from siamese_detr.reporting.runs import AP_EXPLAINED, located, read_config, what_was_run
from siamese_detr.runtime.journal import JsonLines
from siamese_detr.training.detection_task import best_of

ABOUT = (
    "All rows were fine-tuned in the same way on the same labelled images. They differ in the initial weights, and in "
    "what a name ends in: self-training, or a longer fine-tuning."
)
STARTS = {"scratch": "every weight random", "backbone": "pre-trained backbone, random Transformer"}
THEN = {
    "self-training": "; the later part of fine-tuning also learns from the unlabelled images (self-training)",
    "longer": "; fine-tuned for as many more steps as pre-training has (the control of equal compute)",
}


def comparison_page(run: Path, samples: int) -> Page:
    """The page of the comparison in ``run``, with ``samples`` photos as every row sees them.

    Raises:
        UserError: its results cannot be read.
    """
    config, album = read_config(run), Album()
    try:
        document = json.loads((run / "results.json").read_text(encoding="utf-8"))
        cells = [CellResult(**cell) for cell in document["cells"]]
        answers = luck_lines([Difference(**found) for found in document.get("differences", [])])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run / 'results.json'} cannot be read ({error}); run compare again") from error
    facts = {name: str(config.get(name)) for name in ("images", "train", "evaluation")}
    facts["val"] = str(config.get("val") or config.get("train"))
    facts |= {name: ", ".join(map(str, config.get(name) or [])) for name in ("inits", "fractions", "seeds")}
    names = list(dict.fromkeys(cell.init for cell in cells))
    done = [cell for cell in cells if cell.status == "done"]
    pretrain_at = config.get("pretrain_at") or {}
    inits = [starting_point(name, pretrain_at) for name in config.get("inits") or names]
    short = short_names(inits)
    rows = [[short[init.name], meaning(init)] for init in inits]
    initial_weights = Table("Initial weights", ["initialisation", "weights"], rows, long=frozenset([1]))
    sections = [
        Section("Result", [*map(Text, answers), *table_blocks(cells), Text(ABOUT), Text(AP_EXPLAINED)]),
        Section("What is compared", [initial_weights]),
        Section("Plots", plot_blocks(cells)),
        Section("The same photos", picture_blocks(run, config, cells, samples, album)),
        Section("Cells", [cell_table(cells)]),
        what_was_run(run, facts, config),
    ]
    minutes = sum(cell.seconds for cell in done) / 60
    summary = (
        f"{', '.join(names)}: {len(done)} of {len(cells)} fine-tunings are done, in {minutes:.0f} minutes of work."
    )
    return Page("Comparison of initialisations", summary, sections, album.markup())


def table_blocks(cells: list[CellResult]) -> list[Block]:
    table = summary_table(cells)
    rows = [[init, *row] for init, row in zip(table.inits, table.rows, strict=True)]
    strong = frozenset((best, column) for column, best in enumerate(table.best, 1) if best is not None)
    caption = "AP in percent, mean ± standard deviation over seeds (AP50), by percentage of labels used; best in bold"
    blocks: list[Block] = [Table(caption, ["initialisation", *table.headers], rows, strong)]
    blocks += [Missing(cell.name, cell.reason or "not run yet") for cell in cells if cell.status != "done"]
    return blocks


def plot_blocks(cells: list[CellResult]) -> list[Block]:
    figures: list[Figure] = []
    if (figure := plots.label_plot(cells)) is not None:
        described = "; ".join(map(describe, label_curves(cells)))
        alt = f"AP in percent against the percentage of labels used. {described}."
        caption = "The effect of more labels. Bars: ± one standard deviation over seeds."
        figures.append(inline(figure, alt, caption))
    for fraction, figure in plots.convergence_plots(cells).items():
        described = "; ".join(map(describe, convergence_curves(cells, fraction)))
        alt = f"AP in percent against epochs with {percent_of(fraction)} of the labels. {described}."
        caption = "Validation during fine-tuning. Bands: ± one standard deviation over seeds."
        figures.append(inline(figure, alt, caption))
    return [Grid(figures, 330)] if figures else [Missing("Plots", "no fine-tuning is done")]


def picture_blocks(
    run: Path, config: Mapping[str, Any], cells: list[CellResult], samples: int, album: Album
) -> list[Block]:
    """Validation photos with their labels, then with what each row's detector of the first seed finds."""
    which = str(config.get("evaluation", "last"))
    fractions = sorted({cell.fraction for cell in cells if cell.status == "done"})
    middle = fractions[len(fractions) // 2] if fractions else 0.0
    finders: dict[str, Detections] = {}
    try:
        config = located(run, config)
        source = config.get("val") or config["train"]
        dataset = read_labels(source, (config.get("finetune") or {}).get("val_images"), default_split="val")
        for cell in cells:
            if cell.status == "done" and cell.fraction == middle and cell.init not in finders:
                found = Detections.read(run / cell.run / f"detections-{which}.npz")
                finders[cell.init] = found.above(thresholds(run / cell.run, which, len(dataset.class_names)))
    except (UserError, OSError, ValueError, KeyError) as error:
        return [Missing("Pictures", str(error))]
    images = [image for image in dataset.images if (~image.crowd).any()]
    if not (images and finders):
        return [Missing("Pictures", "no fine-tuning is done, or no validation image has a labelled box")]
    text = (
        f"Validation photos at equal distances in the list, and detectors fine-tuned with {percent_of(middle)} of the "
        "labels, first seed. A box is drawn from the score on at which F1 of its class is highest for that detector."
    )
    blocks: list[Block] = [Text(text)]
    for place in np.unique(np.linspace(0, len(images) - 1, samples).round().astype(int)).tolist():
        image = images[place]
        try:
            photo = album.add(read_image(image.path, min_side=album.longest), (image.width, image.height))
        except ImageError as error:
            blocks.append(Missing(image.path.name, str(error)))
            continue
        truth = [Box(box.tolist(), "#ffffff", dashed=True) for box in image.boxes[~image.crowd]]
        labelled = labelled_objects(image, dataset.class_names)
        figures = [photo.draw(truth, f"Photograph {image.path.name}. Labelled: {labelled}.", f"labels: {labelled}")]
        for init, found in finders.items():
            rows = np.flatnonzero(found.images == image.id)
            boxes = predicted_boxes(dataset.class_names, found, rows)
            alt = f"Photograph {image.path.name}. {init} finds: {', '.join(box.tag for box in boxes) or 'nothing'}."
            figures.append(photo.draw(boxes, alt, f"{init}: {len(boxes)} found"))
        blocks += [Heading(image.path.name), Grid(figures, 240)]
    return blocks


def thresholds(run: Path, which: str, classes: int) -> np.ndarray:
    """(classes,) scores of highest F1 at a fine-tuning's best or last evaluation."""
    history = JsonLines(run / "history.jsonl").read()
    record = best_of(history) if which == "best" else history[-1]
    stored = [DEFAULT_THRESHOLD if row["threshold"] is None else row["threshold"] for row in record["classes"]]
    return np.array(stored if len(stored) == classes else [DEFAULT_THRESHOLD] * classes)


def cell_table(cells: list[CellResult]) -> Table:
    rows = [
        [
            cell.init,
            percent_of(cell.fraction),
            "–" if cell.images is None else str(cell.images),
            str(cell.seed),
            cell.status,
            *(percent(cell.metrics.get(name)) for name in ("AP", "AP50", "AP75")),
            f"{cell.seconds:.0f}",
            cell.run,
        ]
        for cell in cells
    ]
    headers = ["initialisation", "labels", "images", "seed", "status", "AP", "AP50", "AP75", "seconds", "run"]
    return Table("Every fine-tuning", headers, rows, long=frozenset([len(headers) - 1]))


def starting_point(name: str, pretrain_at: Mapping[str, Mapping[str, Any]]) -> Init:
    try:
        return parse_init(name, pretrain_at)
    except UserError:  # the detector was moved since
        return Init(name, name, None, {})


def meaning(init: Init) -> str:
    """An initialisation in plain words."""
    then = THEN.get(init.then, "")
    start = STARTS.get(init.start, f"the detector in {init.start}")
    if init.method is None:
        return start + then
    options = ", ".join(f"{key} {value}" for key, value in init.options.items())
    method = find_pretext(init.method).title
    return f"{start}, then pre-trained without labels by {method}{f' with {options}' if options else ''}{then}"
