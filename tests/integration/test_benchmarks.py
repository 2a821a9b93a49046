"""The benchmarks run, and what they compare is the same computation."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from tiny_finetuning import TINY, write_scenes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("pool_padding", [False, True])
@pytest.mark.parametrize("case", ["conditional-detr", "detr", "deformable-single-scale", "deformable-multi-scale"])
def test_the_plain_step_has_our_losses(case: str, pool_padding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    scale = dataclasses.replace(step.Scale.quick(), pool_padding=pool_padding)
    inputs, pretext = step.make_inputs(scale), step.make_pretext(case, scale).double()
    names = ("pixel_values", "crops", "boxes", "query_boxes")
    inputs = dataclasses.replace(inputs, **{name: getattr(inputs, name).double() for name in names})
    learned = [parameter for parameter in pretext.parameters() if parameter.requires_grad]
    random = step.torch.Generator().manual_seed(1)
    for parameter in learned:  # initially, sampling points lie on cells' centres, where the gradient is not unique
        parameter.data += 0.01 * step.torch.randn(parameter.shape, generator=random)
    plain = step.PlainSiamese(pretext, step.Clock())
    with step.HostReads() as theirs:
        loss, expected = plain.losses(inputs, *plain.backbone(inputs))
        gradients = step.torch.autograd.grad(loss, learned)
    step.accelerate(pretext, "cpu")
    pretext.frozen_features(inputs)  # folds the backbone, once
    with step.HostReads() as reads:
        output = pretext(pretext.frozen_features(inputs))
        ours = step.torch.autograd.grad(output.loss, learned)
    assert step.difference(expected, output.terms) <= 1e-6
    for got, want in zip(ours, gradients, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm() + 1e-9
    assert reads.count <= 2 < theirs.count  # the trainer adds one


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_the_step_benchmark_writes_its_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    summary = step.main(
        ["--quick", "--cases", "detr", "--precisions", "fp32", "bf16", "--out", str(tmp_path), "--threads", "1"]
    )
    assert summary["cases"]["detr"]["blocking reads"]["ours"] <= 3
    assert all(value > 0 for value in summary["cases"]["detr"]["peak memory, MB"].values())
    assert "| whole step |" in (tmp_path / "step.md").read_text()
    assert (tmp_path / "step.json").is_file()


def test_both_data_paths_make_the_same_pictures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("siamese_detr.views.sampler.WINDOW", 1)  # no grouping: the sizes within a batch differ
    import data_path

    monkeypatch.setattr(data_path, "BATCH", 3)
    store = data_path.Rows(data_path.shipped_photos(tmp_path, 6))
    summary = data_path.compare(store, data_path.ViewConfig(), rounds=1)
    assert summary["ratios"]["worker"]["median"] > 1
    # The plain path rounds rectangles to pixels and colours to 8 bits: a few hundredths of a standard deviation.
    assert all(0 < value < 0.1 for value in summary["mean difference, normalised units"].values())


def test_the_gpu_benchmark_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    what = ["--cases", "detr", "--variants", "plain", "bf16", "--batch", "2", "--out", str(tmp_path)]
    summary = gpu.main(["--device", "cpu", "--quick", *what])
    assert summary["steps"]["detr"].keys() == {"plain", "bf16"}
    assert "| detr, bf16 |" in gpu.table(summary)
    assert (tmp_path / "gpu.json").is_file()


def test_fine_tuning_is_compared_with_the_trainer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import finetune

    labels = str(write_scenes(tmp_path / "scenes", 4))
    monkeypatch.setattr(finetune, "SIZES", TINY)
    words = [
        "--families",
        "rt-detr",
        "--seeds",
        "0",
        "--updates",
        "3",
        "--batch",
        "2",
        "--side",
        "64",
        "--device",
        "cpu",
    ]
    summary = finetune.main([labels, labels, *words, "--out", str(tmp_path)])
    (row,) = summary["families"]["rt-detr"]["seeds"]
    assert all(row["images/s"][who] > 0 and row["AP"][who] >= 0 for who in ("ours", "theirs"))
    assert "| rt-detr | " in finetune.table(summary)
    assert (tmp_path / "finetune.json").is_file()
