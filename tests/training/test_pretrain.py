"""The verb ``pretrain`` through its public face, at the smallest sizes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForObjectDetection

from conftest import slow
from runs import logged, saved
from siamese_detr import cli
from siamese_detr.detectors.structures import OF_NEW
from siamese_detr.errors import UserError
from siamese_detr.pretext import PRETEXTS
from siamese_detr.pretext.siamese import SiamesePretext
from siamese_detr.runtime.processes import machine_explained
from siamese_detr.training import loop as loop_module
from siamese_detr.training import pretrain as module
from siamese_detr.training.loop import Loop
from siamese_detr.training.pretrain import pretrain
from siamese_detr.training.pretrain_config import PretrainConfig
from siamese_detr.views.config import ViewConfig

pytestmark = pytest.mark.filterwarnings("ignore:backbone 'random")


def test_a_run_leaves_what_it_promises(base: dict[str, Any], tmp_path: Path) -> None:
    """Config, logs of every term, checkpoints, and a detector that Transformers loads alone; proposals made first."""
    out = tmp_path / "run"
    result = pretrain(
        **{
            **base,
            "out": str(out),
            "proposals": None,
            "proposal_method": "random",
            "device": "auto",
            "precision": "bf16",
            "accumulate": 2,
        }
    )
    assert result.steps == 4
    assert result.detector == out / "detector"
    assert np.isfinite(result.loss)
    names = {"loss", "loss_class", "loss_box", "loss_giou", "loss_region", "loss_global", "grad_norm", "learning_rate"}
    names |= {"padded_regions"}
    assert all(names <= record.keys() for record in logged(out))
    assert list((out / "proposals").glob("shard-*"))
    assert list((out / "tensorboard").iterdir())
    session = json.loads((out / "sessions.jsonl").read_text())
    assert (session["images"], session["packages"]["torch"]) == (10, torch.__version__.split("+")[0])
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()} - {""}
    assert not kinds & {".pt", ".pth", ".bin", ".pkl"}
    model = AutoModelForObjectDetection.from_pretrained(out / "detector")
    trained = saved(out, 4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"detector.model.{name}"]), name
    again = pretrain(config=str(out / "config.yaml"), resume=True)  # complete: nothing is done
    assert again.steps == 4


def test_the_closing_hint_repeats_a_recipe_that_finetune_takes(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, repeated in (("lr: 1e-4\n", True), ("lr: 1e-4\ncrop_size: 32\n", False)):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(text)
        options = {key: value for key, value in base.items() if key not in ("lr", "crop_size")}
        pretrain(**{**options, "out": str(tmp_path / str(repeated)), "steps": 1}, recipe=str(recipe))
        assert (f"siamese-detr finetune --recipe {recipe} --train" in capsys.readouterr().err) is repeated


def test_the_frozen_stay_frozen_and_all_else_learns(base: dict[str, Any], tmp_path: Path) -> None:
    """Backbone, its statistics and the class head are bit-identical after training; every other parameter moved."""
    out = tmp_path / "run"
    pretrain(**{**base, "out": str(out), "save_every": 1, "keep": 0})
    first, last = saved(out, 1), saved(out, 4)
    frozen = [name for name in first if ".backbone." in name or "class_labels_classifier" in name]
    assert len(frozen) > 10
    assert all(torch.equal(first[name], last[name]) for name in frozen)
    stuck = [name for name in first.keys() - set(frozen) if torch.equal(first[name], last[name])]
    assert stuck == []


class Poison(SiamesePretext):
    """Gives a NaN from step 3 on: in the loss, or only in the gradient of one bias."""

    where = "loss"
    calls = 0

    def forward(self, features: Any) -> Any:
        output = super().forward(features)
        Poison.calls += 1
        if Poison.calls >= 3 and self.where == "loss":
            output.loss = output.loss * float("nan")
        if Poison.calls >= 3 and self.where == "gradient":
            output.loss = output.loss + 0 * (self.region_embedding.bias.sum() * 0).sqrt()
        if Poison.calls >= 3 and self.where == "matching":
            with torch.no_grad():
                self.class_head.bias.fill_(float("inf"))
            super().forward(features)
        return output


@pytest.mark.parametrize("where", ["loss", "gradient", "matching"])
@pytest.mark.promise("non-finite")
def test_a_nan_stops_before_the_update(
    base: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
) -> None:
    """State before the step is kept, the samples are named, and one command does the step again."""
    monkeypatch.setattr(module, "build_pretext", lambda method, detector, config: Poison(detector, config))
    monkeypatch.setattr(Poison, "where", where)
    monkeypatch.setattr(Poison, "calls", 0)
    monkeypatch.setattr(loop_module, "report_needs", lambda loop: None)  # it tries steps, too
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"not finite at step 3: stopped before the update.*--replay") as stopped:
        pretrain(**{**base, "out": str(out), "save_every": 1, "keep": 0})
    document = json.loads((out / "nonfinite.json").read_text())
    assert (document["step"], len(document["samples"]), len(document["samples"][0])) == (2, 1, 4)
    if where == "gradient":
        assert document["parameters"] == ["region_embedding.bias"]
    state = load_file(out / "nonfinite" / "checkpoint-2" / "model.safetensors")
    if where != "matching":
        before = {name: value for name, value in saved(out, 2).items() if "running" not in name and "num_b" not in name}
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert not (out / "checkpoints" / "checkpoint-3").exists()

    words = shlex.split(str(stopped.value).rpartition(" with: ")[2])
    assert words[:2] == ["siamese-detr", "pretrain"]
    Poison.calls = 2
    assert cli.main(words[1:]) == 0
    assert "step 3: " in capsys.readouterr().err
    Poison.calls = 2
    result = pretrain(**{**base, "out": str(out), "replay": str(out / "nonfinite.json")})
    assert result.replay.startswith("step 3: ")
    assert {"loss": "nan", "gradient": "SqrtBackward", "matching": "class_head"}[where] in result.replay
    Poison.calls = -100
    if where != "matching":
        assert "no update made" in pretrain(**{**base, "out": str(out), "replay": str(out / "nonfinite.json")}).replay


def test_the_last_updates_are_in_the_log(base: dict[str, Any], tmp_path: Path) -> None:
    result = pretrain(**{**base, "out": str(tmp_path / "run"), "steps": 3, "log_every": 2})
    assert [record["step"] for record in logged(tmp_path / "run")] == [2, 3]
    assert np.isfinite(result.loss)


def test_a_new_detector_has_its_familys_sizes_and_an_old_one_its_own(base: dict[str, Any], tmp_path: Path) -> None:
    free = {name: None for name in ("encoder_layers", "dropout", "attention_dropout", "activation_dropout")}
    options = {**base, **free, "steps": 1, "detector": "rt-detr", "view_size": 64}
    pretrain(**{**options, "out": str(tmp_path / "run")})
    made = json.loads((tmp_path / "run" / "detector" / "config.json").read_text())
    assert (made["encoder_layers"], made["dropout"], made["attention_dropout"]) == (1, 0.0, 0.0)
    options = {name: value for name, value in options.items() if name not in OF_NEW}
    pretrain(**{**options, "out": str(tmp_path / "more"), "init": str(tmp_path / "run"), "attention_dropout": 0.1})
    again = json.loads((tmp_path / "more" / "detector" / "config.json").read_text())
    assert (again["dropout"], again["attention_dropout"]) == (0.0, 0.1)


@pytest.mark.parametrize("method", ["up-detr", "detreg", "clusters"])
def test_the_other_methods(base: dict[str, Any], tmp_path: Path, method: str) -> None:
    options = {
        **base,
        "method": method,
        **({"classes": 4} if method == "clusters" else {}),
        "num_regions": 3,
        "out": str(tmp_path / "run"),
        "steps": 2,
    }
    result = pretrain(**{**options, "view_size": None, "short_sides": (40, 48), "max_size": 64})
    assert np.isfinite(result.loss)


def first_terms(options: dict[str, Any], out: Path, **changes: Any) -> dict[str, float]:
    """The loss terms of a run's first update."""
    calm = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    free = {name: value for name, value in options.items() if name != "crop_size"}
    pretrain(**{**free, **calm, **changes, "out": str(out), "steps": 1})
    record = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return {name: value for name, value in record.items() if name.startswith("loss_")}


BOXES, REGION, GLOBAL = {"loss_class", "loss_box", "loss_giou"}, {"loss_region"}, {"loss_global"}


ALL = BOXES | REGION | GLOBAL


@pytest.mark.parametrize(
    ("changes", "gone", "changed", "kept"),
    [
        ({"discrimination": "none"}, REGION | GLOBAL, set(), BOXES),
        ({"discrimination": "region"}, GLOBAL, set(), BOXES | REGION),
        ({"discrimination": "global"}, REGION, set(), BOXES),
        ({"region_target": "roi"}, set(), REGION, BOXES | GLOBAL),
        ({"target_view": "other"}, set(), REGION, BOXES | GLOBAL),
        ({"cross_view": False}, set(), BOXES | REGION, GLOBAL),
        ({"iou": 0.3}, set(), ALL, set()),
        ({"iou": 0.7}, set(), ALL, set()),
        ({"selection": "diverse"}, set(), BOXES | REGION, set()),
        ({"box_source": "random"}, set(), BOXES | REGION, set()),
        ({"num_queries": 9}, set(), ALL, set()),
        ({"num_regions": 2}, set(), BOXES | REGION, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else str(value),  # the order of a set is no name
)
def test_ablations_change_what_they_say(
    base: dict[str, Any],
    plain_terms: dict[str, float],
    tmp_path: Path,
    changes: dict[str, Any],
    gone: set[str],
    changed: set[str],
    kept: set[str],
) -> None:
    """The paper's ablations, from the verb's options to the losses: some terms go, some change, some do not.

    Nothing is said of those that may change because other random numbers are drawn. The class loss of a detector that
    is new may be the same.
    """
    terms = first_terms(base, tmp_path / "run", **changes)
    assert ALL - terms.keys() == gone
    differ = {name for name in ALL & terms.keys() if abs(terms[name] / plain_terms[name] - 1) > 1e-5}
    assert changed - {"loss_class"} <= differ
    assert {name: terms[name] for name in kept} == {name: plain_terms[name] for name in kept}


@pytest.fixture(scope="module")
def plain_terms(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return first_terms(base, tmp_path_factory.mktemp("plain") / "run")


def test_continuing_from_a_detector(base: dict[str, Any], tmp_path: Path) -> None:
    """``init`` takes the Transformer of any directory, its family and its sizes, and the run records no others."""
    pretrain(**{**base, "out": str(tmp_path / "first"), "steps": 1})
    options = {name: value for name, value in base.items() if name not in OF_NEW}
    options |= {"init": str(tmp_path / "first" / "detector"), "lr": 1e-12, "steps": 1}
    pretrain(**{**options, "out": str(tmp_path / "second")})
    assert not {*OF_NEW} & yaml.safe_load((tmp_path / "second" / "config.yaml").read_text()).keys()
    pretrain(**{**options, "out": str(tmp_path / "second"), "resume": True})
    first = load_file(tmp_path / "first" / "detector" / "model.safetensors")
    second = load_file(tmp_path / "second" / "detector" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[name].float(), second[name].float(), atol=1e-9) for name in first)


def test_the_flat_configuration_is_that_of_its_parts() -> None:
    """Every option of views and methods can be given, under its name, and has its default."""
    config = PretrainConfig(images="a", out="b")
    assert config.views() == ViewConfig()
    for method, kind in PRETEXTS.items():
        assert PretrainConfig(images="a", out="b", method=method).pretext() == kind()
    changed = PretrainConfig(images="a", out="b", jitter_queries=False, box_jitter=0.2, view_size=96)
    assert not changed.pretext().jitter_queries  # type: ignore[attr-defined]
    assert (changed.views().box_jitter, changed.views().view_size) == (0.2, 96)


def test_every_micro_batch_of_every_process_draws_its_own_dropout(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients, forward, drawn, rank = Loop.gradients, SiamesePretext.forward, [], 0

    def gradients_of_rank(loop: Loop, *arguments: Any) -> Any:
        loop.team.rank = rank
        return gradients(loop, *arguments)

    def noted(*arguments: Any) -> Any:
        drawn.append(torch.rand(()).item())
        return forward(*arguments)

    monkeypatch.setattr(Loop, "gradients", gradients_of_rank)
    monkeypatch.setattr(SiamesePretext, "forward", noted)
    monkeypatch.setattr(loop_module, "report_needs", lambda loop: None)  # it tries steps, too
    for rank in range(2):
        pretrain(**{**base, "out": str(tmp_path / str(rank)), "steps": 2, "accumulate": 2})
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 2


def test_gradient_checkpointing_changes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    pretrain(**{**base, "out": str(tmp_path / "plain"), "steps": 2})
    pretrain(**{**base, "out": str(tmp_path / "saving"), "steps": 2, "checkpoint_activations": True})
    assert logged(tmp_path / "plain") == logged(tmp_path / "saving")


@slow
def test_compiling_changes_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    """But the dropout, which is PyTorch's then."""
    options = {**base, "steps": 2, "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    pretrain(**{**options, "out": str(tmp_path / "plain")})
    pretrain(**{**options, "out": str(tmp_path / "compiled"), "compile": True})
    for plain, compiled in zip(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), strict=True):
        for name in (name for name in plain if name.startswith("loss")):
            assert compiled[name] == pytest.approx(plain[name], rel=1e-4), name
        assert compiled["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-2)  # batch norms over four images


def test_without_a_compiler_compiling_ends_in_one_line(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, str(tmp_path / "missing")))
    with pytest.raises(UserError, match=r"torch.compile failed \(.*compiler.*leave out compile"):
        pretrain(**{**base, "out": str(tmp_path / "run"), "compile": True})


def test_what_a_compiler_says_is_told() -> None:
    def refusing(*_: Any) -> Any:
        raise ValueError("nothing to compile with")

    compiled = torch.compile(lambda x: x * 2, backend=refusing)
    said = r"raised: ValueError: nothing to compile with\).* and go on"
    with pytest.raises(UserError, match=said), machine_explained("go on"):
        compiled(torch.ones(3))
