"""How long a comparison takes: said before it starts, and followed while it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from siamese_detr.comparison.compare import CompareConfig, apply_recipe
from siamese_detr.comparison.duration import START, Watch, estimate
from siamese_detr.comparison.plan import Plan
from siamese_detr.scenes import make_scenes

TINY = {"detector": "detr", "backbone": "random:resnet18", "hidden_size": 16, "heads": 2, "encoder_layers": 1}
TINY |= {"decoder_layers": 1, "ffn_size": 16, "num_queries": 12, "view_size": 64}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    make_scenes(tmp_path / "train", 8, seed=1)
    labels = str(tmp_path / "train.json")
    config = CompareConfig(
        images=str(tmp_path / "train"),
        train=labels,
        val=labels,
        out=str(tmp_path / "out"),
        fractions=(1.0,),
        seeds=(0,),
        pretrain=TINY | {"steps": 10, "batch_size": 4},
        finetune={"steps": 20, "batch_size": 4, "image_size": 64, "eval_every": 0, "device": "cpu"},
    )
    return Plan(apply_recipe(config))


def test_the_estimate_grows_with_the_work_and_shrinks_with_the_devices(plan: Plan) -> None:
    fine_tuning = [task for task in plan.tasks if task.cell]
    assert [task.work for task in fine_tuning] == [pytest.approx(20 * 4 + 8 / 3)] * 2
    assert next(task.work for task in plan.tasks if task.verb == "pretrain") == 10 * 4 * 2
    seconds = estimate(plan, plan.tasks, 1)
    assert seconds is not None
    assert seconds > 4 * START
    assert seconds < 4 * START + 60
    assert estimate(plan, [], 1) is None


def test_the_bar_follows_the_logs_of_the_runs(plan: Plan) -> None:
    first, second = (task for task in plan.tasks if task.cell)
    with Watch([first, second]) as watch:
        first.run.mkdir(parents=True)
        (first.run / "log.jsonl").write_text(json.dumps({"step": 10, "loss": 1.0}) + "\n")
        watch.look()
        assert watch.bar.tasks[0].completed == round(first.work / 2)
        watch.ended(first.name)
        assert watch.bar.tasks[0].completed == round(first.work)
