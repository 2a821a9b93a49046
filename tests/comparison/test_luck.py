"""Differences between the rows of a comparison, and how far luck goes."""

from __future__ import annotations

import numpy as np
import pytest

from compared_cells import cell
from siamese_detr.comparison.luck import differences, luck_lines

RANDOM = np.random.default_rng(0)
PHOTOS = RANDOM.normal(0, 0.03, 1000)
"""What the draws of photos do to all detectors alike."""


def found(aps: dict[str, list[float]], noise: float = 0.005) -> list:
    cells = [cell(init, 0.1, seed, ap) for init, values in aps.items() for seed, ap in enumerate(values)]
    drawn = {
        (c.init, c.fraction, c.seed): c.metrics["AP"] + PHOTOS + RANDOM.normal(0, noise, 1000)
        for c in cells
        if c.metrics["AP"] is not None
    }
    return differences(cells, drawn)


def test_what_moves_both_alike_is_no_luck() -> None:
    (difference,) = found({"backbone": [0.20, 0.22], "siamese": [0.24, 0.25]})
    assert difference.mean == pytest.approx(0.035)
    assert difference.by_seed == pytest.approx({0: 0.04, 1: 0.03})
    assert 0.01 < difference.low < 0.035 < difference.high < 0.06
    (sentence, legend) = luck_lines([difference])
    assert sentence.startswith("siamese adds 3.5 AP [")
    assert sentence.endswith("] to backbone at 10 % of the labels")
    assert "these 2" in legend


def test_a_difference_that_photos_or_seeds_may_undo_is_none() -> None:
    (photos,) = found({"backbone": [0.20], "siamese": [0.21]}, noise=0.02)
    (seeds,) = found({"backbone": [0.20, 0.20], "siamese": [0.28, 0.18]})
    for difference in (photos, seeds):
        assert difference.low < 0 < difference.high
        assert "no difference that these photos can show (+" in str(difference)


def test_a_loss_is_said_with_positive_numbers() -> None:
    (difference,) = found({"backbone": [0.25, 0.25], "siamese": [0.20, 0.20]})
    assert str(difference).startswith("siamese costs 5.0 AP [")


def test_rows_that_were_only_trained_longer_are_a_second_yardstick() -> None:
    aps = {"backbone": [0.2], "backbone+longer": [0.22], "siamese": [0.25]}
    pairs = [(difference.init, difference.against) for difference in found(aps)]
    assert pairs == [("backbone+longer", "backbone"), ("siamese", "backbone"), ("siamese", "backbone+longer")]


def test_only_seeds_that_both_have_are_compared() -> None:
    cells = [cell("backbone", 0.1, 0, 0.1), cell("backbone", 0.1, 1, 0.5), cell("siamese", 0.1, 0, 0.2)]
    drawn = {(c.init, c.fraction, c.seed): np.full(10, c.metrics["AP"]) for c in cells}
    (difference,) = differences(cells, drawn)
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.1, 0.1, 0.1))
    assert differences(cells, {}) == []
