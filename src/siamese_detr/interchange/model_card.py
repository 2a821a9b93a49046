"""The README.md beside a fine-tuned detector: what it finds, how well, what it learnt from, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from siamese_detr.evaluation.coco import percent
from siamese_detr.files import write_text
from siamese_detr.images.labels import DetectionDataset

FILE = "README.md"
USE = """
```python
import siamese_detr

siamese_detr.load("{place}").predict("photo.jpg")[0].plot()
```

or with Transformers alone:

```python
from transformers import pipeline

pipeline("object-detection", model="{place}")("photo.jpg")
```
"""


def write_card(
    folder: Path,
    provenance: Mapping[str, Any],
    train: DetectionDataset,
    validation: DetectionDataset | None,
    metrics: Mapping[str, Any] | None,
) -> None:
    """Write ``README.md``, with the metadata that the Hugging Face Hub reads.

    Args:
        folder: of the detector.
        provenance: what is recorded of the detector's origin.
        train, validation: the labels; of the folders' paths, nothing is written.
        metrics: the line of history.jsonl about these weights.
    """
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        license="unknown",
        tags=["siamese-detr", str(provenance.get("family")), "object-detection"],
    )
    method = provenance.get("method")
    counts = train.class_counts()
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {provenance.get('family')} for {', '.join(train.class_names[:5])}{', …' * (len(train.class_names) > 5)}",
        f"A {provenance.get('family')} detector"
        + (f" on {provenance['backbone']}" if provenance.get("backbone") else "")
        + (f", pre-trained on unlabelled photos ({method})" if method else "")
        + ", fine-tuned with siamese-detr.",
        f"## Use\n{USE.format(place=folder.absolute())}",
        f"## Data\n\n{len(train)} training images with {counts[:, 0].sum()} boxes"
        + (f"; {len(validation)} validation images." if validation is not None else "; no validation images."),
    ]
    if metrics is not None:
        rows = {row["name"]: row for row in metrics["classes"]}
        table = ["| class | training boxes | AP | AP50 | threshold |", "|---|---|---|---|---|"]
        for name, count in zip(train.class_names, counts[:, 0].tolist(), strict=True):
            row = rows.get(name, {})
            numbers = " | ".join(percent(row.get(key)) for key in ("AP", "AP50", "threshold"))
            table.append(f"| {name} | {count} | {numbers} |")
        table.append(f"| **all** | {counts[:, 0].sum()} | {percent(metrics['AP'])} | {percent(metrics['AP50'])} | |")
        lines.append("## Metrics\n\nOn the validation images, in per cent (COCO's AP):\n\n" + "\n".join(table))
    lines.append("## Licence\n\nNot stated yet: it depends on the photos. Set `license` at the top of this file.")
    write_text(folder / FILE, "\n\n".join(lines) + "\n")
