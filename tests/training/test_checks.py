"""What a run says that it will take, before it begins."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from siamese_detr.training import checks
from siamese_detr.training.checks import Estimate, control_group_free
from siamese_detr.training.detection_task import DetectionTask
from siamese_detr.training.finetune import finetune
from tiny_finetuning import QUICK, TINY, write_scenes


@pytest.mark.parametrize(
    ("free", "accumulate", "said"),
    [
        (17e9, 1, "this run takes about 10 min and up to 17.0 GB of memory; 17.0 GB are free"),
        (16e9, 1, "warning: this run needs up to 17.0 GB of memory, but 16.0 GB are free: .*; use accumulate 2"),
        (16e9, 2, "this run takes about 10 min and up to 9.0 GB"),
        (4e9, 1, "use accumulate 8$"),
        (2e9, 1, "use accumulate 16$"),
        (1e9, 2, "use accumulate 16 and smaller images"),
    ],
)
def test_a_run_that_does_not_fit_names_the_remedy(free: float, accumulate: int, said: str) -> None:
    text = Estimate(fixed=1e9, per_image=1e9, free=free, seconds=600).text(16, accumulate)
    assert re.search(said, text), text


def test_a_run_says_what_it_takes_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """RT-DETR's encoder has batch norms, whose statistics a trial step would change."""
    labels = str(write_scenes(tmp_path / "scenes", 4))
    options = {**TINY, **QUICK, "train": labels, "val": labels, "steps": 2, "detector": "rt-detr", "batch_size": 2}
    one = finetune(out=str(tmp_path / "one"), **options)
    assert "GB of memory;" in capsys.readouterr().err
    monkeypatch.setattr(checks, "free_memory", lambda device: 1e6)
    assert finetune(out=str(tmp_path / "warned"), **options).last == one.last
    assert "warning: this run needs up to" in capsys.readouterr().err
    monkeypatch.setattr("siamese_detr.training.loop.report_needs", lambda loop: None)
    other = finetune(out=str(tmp_path / "other"), **options)
    assert "GB of memory" not in capsys.readouterr().err
    assert other.history == one.history


def test_a_trial_that_fails_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes, the others would wait for its gradients: they are asked after each trial."""
    labels = str(write_scenes(tmp_path / "scenes", 4))
    sizes: list[int] = []

    def fails(task: DetectionTask, images: int) -> None:
        sizes.append(images)
        raise ValueError("of this process alone")

    monkeypatch.setattr(DetectionTask, "largest", fails)
    finetune(train=labels, out=str(tmp_path / "run"), steps=1, **TINY, **QUICK)
    assert sizes == [1]


def test_limits_of_containers_count(tmp_path: Path) -> None:
    job = tmp_path / "groups" / "jobs" / "7"
    job.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/jobs/7\n")
    for folder, limit in ((job, "max"), (job.parent, "1000")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("700")
        (folder / "memory.stat").write_text("anon 500\ninactive_file 150\n")
    assert control_group_free(tmp_path / "groups", tmp_path / "own") == [450]
    assert control_group_free(tmp_path / "groups", tmp_path / "none") == []
