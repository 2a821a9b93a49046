"""Cells of a small comparison."""

from __future__ import annotations

from siamese_detr.comparison.summary import (
    CellResult,
)


def cell(init: str, fraction: float, seed: int, ap: float | None, **other: object) -> CellResult:
    history = [{"epoch": e, "AP": None if ap is None else ap * e / 4} for e in (1, 2, 4)]
    values: dict = {
        "status": "done",
        "metrics": {"AP": ap, "AP50": 0.5},
        "history": history,
        "images": 40,
        "seconds": 90.0,
    }
    values["pretraining_seconds"] = 600.0 * (init == "siamese")
    return CellResult(init, fraction, seed, **(values | other))


CELLS = [
    cell("backbone", 0.1, 0, 0.10),
    cell("backbone", 0.1, 1, 0.14),
    cell("backbone", 1.0, 0, 0.40),
    cell("siamese", 0.1, 0, 0.20),
    cell("siamese", 0.1, 1, None, status="failed", reason="exit code 2: disk | full", metrics={}, history=[]),
    cell("siamese", 1.0, 0, 0.39),
]
