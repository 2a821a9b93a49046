"""Results are written aside: what a kill or a full disk leaves is the old file or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from compared_cells import CELLS
from limits import largest_file
from siamese_detr.comparison.results import write_plots, write_tables
from siamese_detr.evaluation.evaluate import evaluate
from siamese_detr.evaluation.predict import predict
from siamese_detr.files import clean, write_json, write_text
from tiny_detectors import tiny_detector
from tiny_finetuning import CLASSES, write_scenes


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "predictions.json"
    write_json(file, {"boxes": [1]})
    with largest_file(10_000), pytest.raises(OSError, match="large"):
        write_text(file, "x" * 20_000)
    assert file.read_text() == '{\n "boxes": [\n  1\n ]\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".writing-best-x").mkdir()
    (tmp_path / ".writing-best-x" / "model.safetensors").write_text("half")
    (tmp_path / ".writing-table.md").write_text("half")
    (tmp_path / "best").mkdir()
    (tmp_path / ".removing-link").symlink_to(tmp_path / "best")
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "best"]


@pytest.mark.promise("whole-results")
def test_every_result_is_renamed_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that there is no moment at which a kill leaves half of one under its name."""
    labels = write_scenes(tmp_path / "scenes", 3)
    tiny_detector("conditional-detr", classes=2).save(tmp_path / "detector", class_names=CLASSES, shortest_edge=96)
    out, renamed, replace = tmp_path / "out", set(), os.replace

    def noted(source: Any, target: Any) -> None:
        assert not Path(target).exists()
        replace(source, target)
        renamed.add(Path(target))

    monkeypatch.setattr(os, "replace", noted)
    options = {"model": str(tmp_path / "detector"), "device": "cpu", "workers": 0}
    evaluate(labels=str(labels), out=str(out / "metrics.json"), **options)
    predict(images=str(labels), out=str(out / "found"), threshold=0.0, **options)
    write_tables(out, CELLS)
    write_plots(out, CELLS)
    written = {path for path in out.rglob("*") if path.is_file()}
    assert {path.suffix for path in written} == {".json", ".jpg", ".md", ".svg", ".png"}
    assert written == renamed
