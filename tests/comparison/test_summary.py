"""A comparison's table, files and plots from its cells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compared_cells import CELLS, cell
from siamese_detr.comparison import plots
from siamese_detr.comparison.summary import (
    convergence_curves,
    entries,
    label_curves,
    summary_table,
    to_json,
    to_markdown,
)


def test_mean_and_sample_deviation_over_the_seeds_that_are_done() -> None:
    first, *_, last = entries(CELLS)
    assert (first.init, first.fraction, first.count) == ("backbone", 0.1, 2)
    assert first.mean == pytest.approx(0.12)
    assert first.std == pytest.approx(0.0282842712)
    assert last.std is None
    assert last.mean == pytest.approx(0.39)


def test_markdown_tells_best_missing_and_failed() -> None:
    text = to_markdown(CELLS)
    assert "| backbone | 12.0 ± 2.8 (50.0) | **40.0 (50.0)** | 0.0 | 1.5 |" in text
    assert "| siamese | **20.0 (50.0, 1 of 2 seeds)** | 39.0 (50.0) | 10.0 | 1.5 |" in text
    assert "- siamese, 10 %, seed 1: failed (exit code 2: disk \\| full)" in text
    assert summary_table(CELLS).headers[:2] == ["10 % (40 images)", "100 % (40 images)"]


def test_json_holds_every_number() -> None:
    document = json.loads(json.dumps(to_json(CELLS)))
    assert document["entries"][0]["mean"] == pytest.approx(0.12)
    assert len(document["cells"]) == len(CELLS)
    assert document["cells"][4]["reason"] == "exit code 2: disk | full"


def test_curves_against_labels_and_epochs() -> None:
    backbone, siamese = label_curves(CELLS)
    assert backbone.x == [10, 100]
    assert siamese.mean == pytest.approx([20, 39])
    backbone, siamese = convergence_curves(CELLS, 0.1)
    assert backbone.x == [1, 2, 4]
    assert backbone.mean == pytest.approx([3, 6, 12])
    assert backbone.high[-1] - backbone.low[-1] == pytest.approx(2 * 2.8284, abs=1e-3)
    assert siamese.mean == pytest.approx([5, 10, 20])


def test_seeds_with_other_numbers_of_images_make_one_curve() -> None:
    """Parts of the labels drawn with other seeds differ by an image or so, and so do the epochs of the evaluations."""
    histories = [[(1.0, 0.1), (2.0, 0.3)], [(1.14, 0.2), (2.29, 0.4)]]
    cells = [
        cell("siamese", 0.1, seed, 0.3, history=[{"epoch": e, "AP": ap} for e, ap in history])
        for seed, history in enumerate(histories)
    ]
    (curve,) = convergence_curves(cells, 0.1)
    assert curve.x == pytest.approx([1.07, 2.145])
    assert curve.mean == pytest.approx([15, 35])
    assert curve.high[0] - curve.mean[0] == pytest.approx(7.0711, abs=1e-3)


def test_plots_are_written(tmp_path: Path) -> None:
    figure = plots.label_plot(CELLS)
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["10", "100"]
    plots.save(figure, tmp_path / "labels")
    assert (tmp_path / "labels.png").stat().st_size > 1000
    assert "AP against labels" in (tmp_path / "labels.svg").read_text()
    assert list(plots.convergence_plots(CELLS)) == [0.1, 1.0]
    assert plots.label_plot([CELLS[4]]) is None
