"""``compare``: which runs it makes, and that it makes none twice. A quick stand-in takes the place of the runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from label_files import write_yolo
from siamese_detr import cli
from siamese_detr.comparison import compare as module
from siamese_detr.comparison.compare import CompareConfig, CompareResult, apply_recipe, compare
from siamese_detr.comparison.plan import Task
from siamese_detr.comparison.schedule import Job
from siamese_detr.detectors import build_detector
from siamese_detr.detectors.structures import OF_NEW
from siamese_detr.errors import UserError
from siamese_detr.images.labels import read_labels
from siamese_detr.scenes import make_scenes

# Writes what fine-tuning writes: AP is 0.1 from scratch, 0.3 from a model, plus a hundredth of the seed.
STAND_IN = """
import json, os, sys, yaml
options = yaml.safe_load(open(sys.argv[1]))
out = options["out"]
os.makedirs(out, exist_ok=True)
open(os.environ["RUNS"], "a").write(sys.argv[2] + "\\n")
if os.environ.get("BREAK", "no such task") in sys.argv[2]:
    sys.exit("the disk is full")
json.dump(options, open(out + "/config.yaml", "w"))
if "train" in options:
    ap = (0.3 if options["model"] else 0.1) + options["seed"] / 100
    record = {"step": 8, "epoch": 2.0, "AP": ap, "AP50": 2 * ap, "AP_small": None, "train_loss": 1.0, "classes": []}
    half = record | {"step": 4, "epoch": 1.0, "AP": ap / 2}
    open(out + "/history.jsonl", "w").write(json.dumps(half) + "\\n" + json.dumps(record) + "\\n")
    json.dump({"best": record, "last": record}, open(out + "/metrics.json", "w"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_scenes(folder / "train", 8, seed=1)
    make_scenes(folder / "val", 8, seed=2)
    return folder


@pytest.fixture
def options(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    real = module.job_of
    runs = tmp_path / "runs.txt"
    runs.touch()
    monkeypatch.setenv("RUNS", str(runs))
    monkeypatch.delenv("BREAK", raising=False)

    def job_of(task: Task, missing: dict[str, Task]) -> Job:
        job = real(task, missing)
        # Without site packages a stand-in starts in no time; yaml alone is looked up.
        code = f"import sys; sys.path.append({str(Path(yaml.__file__).parents[1])!r})\n{STAND_IN}"
        return Job(job.name, (sys.executable, "-S", "-c", code, job.command[-1], job.name), job.output, job.needs)

    monkeypatch.setattr(module, "job_of", job_of)
    monkeypatch.setattr(module, "estimate", lambda plan, missing, slots: sum(task.work for task in missing))
    return {
        "images": str(data / "train"),
        "train": str(data / "train.json"),
        "val": str(data / "val.json"),
        "out": str(tmp_path / "out"),
        "inits": ("backbone", "siamese"),
        "fractions": (0.5, 1.0),
        "seeds": (0, 1),
        "parallel": 2,
    }


def ran(options: dict[str, Any]) -> list[str]:
    """The runs made since the last call."""
    file = Path(options["out"]).parent / "runs.txt"
    lines = file.read_text().splitlines()
    file.write_text("")
    return sorted(lines)


def command(options: dict[str, Any]) -> list[str]:
    return ["compare", options["images"], options["train"], options["out"], "--val", options["val"]]


def run(options: dict[str, Any], **changes: Any) -> CompareResult:
    return compare(**{**options, **changes})


def test_table_plots_and_everything_needed_to_repeat_a_cell(options: dict[str, Any]) -> None:
    result = run(options)
    assert len(ran(options)) == 2 + 2 * 2 * 2
    out = Path(options["out"])
    assert "| siamese | **30.5 ± 0.7 (61.0)** | **30.5 ± 0.7 (61.0)** | " in (out / "table.md").read_text()
    assert {"table.md", "results.json", "ap-against-labels.png", "convergence-0.5.svg"} <= {
        p.name for p in out.iterdir()
    }
    cell = next(c for c in result.cells if (c.init, c.fraction, c.seed) == ("siamese", 0.5, 1))
    assert cell.metrics["AP"] == pytest.approx(0.31)
    assert [record["epoch"] for record in cell.history] == [1, 2]
    stored = json.loads((out / "cells/siamese/0.5/1/result.json").read_text())
    assert stored["configuration"]["fraction"] == 0.5
    assert stored["configuration"]["seed"] == 1
    written = yaml.safe_load(next((out / "cells/siamese/0.5/1").glob("run-*.yaml")).read_text())
    assert written["model"].startswith(str(out / "pretrained" / "siamese"))


def test_nothing_is_run_twice_and_a_change_runs_only_what_it_touches(options: dict[str, Any]) -> None:
    options["fractions"] = (0.5,)
    run(options)
    ran(options)
    run(options)
    assert ran(options) == []
    run(options, finetune={"workers": 0})  # how it is run, not what
    assert ran(options) == []
    run(options, seeds=(0, 1, 2))
    assert ran(options) == ["fine-tuning backbone, 50 %, seed 2", "fine-tuning siamese, 50 %, seed 2"]
    run(options, pretrain={"lambda_global": 1.0})
    assert len(ran(options)) == 1 + 2  # the pre-training and what starts from it; not the proposals, not the backbone's
    run(options, finetune_at={"0.5": {"epochs": 70}})
    assert len(ran(options)) == 4
    run(options)  # the first configuration again: its results are still there
    assert ran(options) == []


def test_nothing_depends_on_where_images_and_banks_are(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    options |= {"fractions": (1.0,), "seeds": (0,)}
    run(options)
    ran(options)
    run(options, pretrain={"bank_dir": str(tmp_path / "banks"), "compile": True})
    assert ran(options) == []
    shutil.copytree(data / "train", tmp_path / "moved")
    moved = {**options, "images": str(tmp_path / "moved")}
    run(moved)
    assert ran(options) == []
    run(moved, pretrain={"lambda_global": 1.0})  # a store finds its images only where they were
    assert ran(options) == ["fine-tuning siamese, 100 %, seed 0", "pre-training siamese", "proposals edge-boxes"]


def test_another_detector_is_another_detector_for_all(options: dict[str, Any]) -> None:
    run(options, pretrain={"num_queries": 30})
    ran(options)
    cells = Path(options["out"]) / "cells"
    for init, queries in (("backbone", 30), ("siamese", None)):  # the latter starts from the detector pre-trained
        assert yaml.safe_load(next((cells / init / "1/0").glob("run-*.yaml")).read_text()).get("num_queries") == queries
    with pytest.raises(UserError, match="num_queries"):
        run(options, finetune={"num_queries": 50})


def test_the_budget_is_the_same_for_all(options: dict[str, Any]) -> None:
    run(options, inits=("scratch", "backbone", "siamese", "detreg"), finetune={"epochs": 3}, seeds=(0,))
    cells = Path(options["out"]) / "cells"
    configurations = [yaml.safe_load(file.read_text()) for file in sorted(cells.glob("*/1/0/run-*.yaml"))]
    assert len(configurations) == 4
    for configuration in configurations:
        for name in ("model", "kept_share", "out", *OF_NEW):  # a detector to start from has its own
            configuration.pop(name, None)
    assert all(configuration == configurations[0] for configuration in configurations)
    backbones = {
        file.parts[-4]: yaml.safe_load(file.read_text()).get("backbone") for file in cells.glob("*/1/0/run-*.yaml")
    }
    assert backbones["scratch"] == "random:efficientnet-lite0"
    assert backbones["backbone"] == "efficientnet-lite0"


def test_a_failure_is_reported_and_only_it_is_tried_again(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BREAK", "fine-tuning backbone, 50 %, seed 1")
    result = run(options)
    ran(options)
    broken = [cell for cell in result.cells if cell.status != "done"]
    assert [(c.init, c.fraction, c.seed, c.status) for c in broken] == [("backbone", 0.5, 1, "failed")]
    assert "the disk is full" in broken[0].reason
    assert "the disk is full" in str(result)
    monkeypatch.delenv("BREAK")
    assert all(cell.status == "done" for cell in run(options).cells)
    assert ran(options) == ["fine-tuning backbone, 50 %, seed 1"]


def test_a_failed_pretraining_leaves_the_others(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BREAK", "pre-training siamese")
    status = {(cell.init, cell.status) for cell in run(options).cells}
    assert status == {("backbone", "done"), ("siamese", "skipped")}


@pytest.mark.skipif(sys.platform == "win32", reason="directories are not locked there")
def test_a_run_that_a_killed_comparison_left_is_waited_for(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told to stop when its parent died, and is still in its last step when the comparison goes on."""
    options |= {"inits": ("backbone",), "fractions": (1.0,), "seeds": (0,)}
    with monkeypatch.context() as patch:
        patch.setenv("BREAK", "fine-tuning backbone")
        (cell,) = run(options).cells
    assert ran(options) == ["fine-tuning backbone, 100 %, seed 0"]
    code = """
import fcntl, sys, time
lock = open(sys.argv[1], "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("locked", flush=True)
time.sleep(1)
open(sys.argv[2], "a").write("released\\n")
"""
    runs = Path(options["out"]).parent / "runs.txt"
    command = [sys.executable, "-S", "-c", code, str(Path(options["out"]) / cell.run / ".lock"), str(runs)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == "locked\n"
        assert [cell.status for cell in run(options).cells] == ["done"]
    assert runs.read_text().splitlines() == ["released", "fine-tuning backbone, 100 %, seed 0"]


def test_changed_labels_run_again(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    labels = tmp_path / "train.json"
    document = json.loads((data / "train.json").read_text())
    labels.write_text(json.dumps(document))
    given = {"train": str(labels), "finetune": {"train_images": str(data / "train")}, "inits": ("backbone",)}
    run(options, **given)
    assert len(ran(options)) == 4
    document["annotations"][0]["bbox"][2] -= 1
    labels.write_text(json.dumps(document))
    run(options, **given)
    assert len(ran(options)) == 4


def test_the_validation_split_of_a_data_yaml_is_found(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    described = write_yolo(tmp_path / "yolo", read_labels(data / "train.json"))
    del options["val"]
    assert all(cell.status == "done" for cell in run(options, train=str(described)).cells)
    (written, *_) = (Path(options["out"]) / "cells/backbone/1/0").glob("run-*.yaml")
    assert yaml.safe_load(written.read_text())["val"] == str(described)
    with pytest.raises(UserError, match=r"train\.json has no validation split: give .* --val"):
        run(options)


def test_classes_are_matched_by_name(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    """As fine-tuning matches them: VOC folders list only classes that occur, so two seldom list the same."""
    document = json.loads((data / "train.json").read_text())
    document["categories"].append({"id": 99, "name": "zebra"})
    (tmp_path / "more.json").write_text(json.dumps(document))
    given = {"finetune": {"train_images": str(data / "train")}, "inits": ("backbone",), "dry_run": True}
    run(options, train=str(tmp_path / "more.json"), **given)
    for category in document["categories"]:
        category["name"] += " alien"
    (tmp_path / "alien.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="no name in common"):
        run(options, train=str(tmp_path / "alien.json"), **given)


def test_names_defined_in_pretrain_at_are_initialisations(options: dict[str, Any]) -> None:
    pretrain_at = {"without crops": {"method": "siamese", "region_target": "roi"}, "detreg": {"embedding_weight": 2.0}}
    run(options, inits=("without crops", "detreg"), pretrain_at=pretrain_at, fractions=(1.0,), seeds=(0,))
    out = Path(options["out"])
    found = {f.parts[-2]: yaml.safe_load(f.read_text()) for f in (out / "pretrained").glob("*/run-*.yaml")}
    assert {v["method"] for v in found.values()} == {"siamese", "detreg"}
    assert next(v for v in found.values() if v["method"] == "siamese")["region_target"] == "roi"
    detreg = next(v for v in found.values() if v["method"] == "detreg")
    assert detreg["embedding_weight"] == 2.0
    assert "selective-search" in detreg["proposals"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inits": ("siames",)}, "siames"),
        ({"inits": ()}, "inits"),
        ({"fractions": (0.0,)}, "fractions"),
        ({"finetune": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"finetune": {"epochs": "many"}}, "epochs"),
        ({"finetune": {"fraction": 0.1}}, "compare sets fraction itself"),
        ({"finetune_at": {"0.3": {}}}, "0.3"),
        ({"pretrain_at": {"detreg": {}}}, "not among inits"),
        ({"train": "nowhere.json"}, "nowhere.json"),
        ({"recipe": "paper-table-9"}, "paper-table-9"),
        ({"pretrain": {"short_sides": "[80, 96"}}, "short_sides='\\[80, 96' in pretrain options is not valid YAML"),
        ({"inits": ("siamese:iuo=0.3",)}, "did you mean 'iou'"),
        ({"inits": ("siamese+longer",)}, "use backbone\\+longer"),
        ({"inits": ("backbone+self-training",)}, "averaged weights"),
        ({"finetune": {"unlabelled": "photos"}}, "compare sets unlabelled itself"),
        ({"inits": ("siamese:discrimination=all",)}, "discrimination='all'"),
        ({"inits": ("siamese:num_regions=200",)}, "too few queries"),
        ({"pretrain": {"backbone": "nowhere.pth"}}, r"nowhere\.pth"),
        ({"pretrain": {"detector": "conditional-dter"}}, "did you mean 'conditional-detr'"),
    ],
)
def test_mistakes_are_found_before_anything_is_run(
    options: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(options, **changes)
    assert ran(options) == []
    assert not Path(options["out"]).exists()


@pytest.mark.parametrize("name", ["paper-table-1", "paper-table-2"])
def test_recipes_state_the_papers_protocol(
    options: dict[str, Any], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CompareConfig(**{k: options[k] for k in ("images", "train", "val", "out")}, recipe=name, seeds=(3,))
    filled = apply_recipe(config)
    assert filled.inits == ("backbone", "up-detr", "detreg", "siamese")
    assert filled.seeds == (3,)  # the user's word
    assert apply_recipe(dataclasses.replace(config, seeds=(0, 1))).seeds == (0, 1)  # also where it is the usual one
    run({k: options[k] for k in ("images", "train", "val", "out")}, recipe=name, dry_run=True)
    assert not Path(options["out"]).exists()
    told = capsys.readouterr().err
    for part in ("Published AP", "8 in ", "steps 300000, batch_size 256", "detreg: proposals selective-search"):
        assert part in told
    for part in ("epochs 50, batch_size 16", "lambda_region 5, lambda_global 10"):
        assert part in told
    (command,) = re.findall(r"siamese-detr (compare .*)", told.replace("\\\n", " "))
    given = {"IMAGENET/train": options["images"], "COCO/annotations/instances_train2017.json": options["train"]}
    given |= {"VOC-trainval-07+12.json": options["train"], "VOC-test-07.json": options["val"]}
    given |= {"COCO/annotations/instances_val2017.json": options["val"], "OUT": options["out"]}
    given |= {"swav_800ep_pretrain.pth.tar": "random:resnet50"}
    words = [given.get(word, word) for word in command.split()]
    assert cli.main([*words, "--dry-run"]) == 0


def test_a_table_of_ablations(options: dict[str, Any]) -> None:
    """Initialisations that differ in options of pre-training, from the shell."""
    inits = ["siamese", "siamese:discrimination=none", "siamese:num_queries=20,short_sides=[80,96],iou=0.3"]
    arguments = [*command(options), "--inits", *inits]
    arguments += ["--fractions", "1", "--seeds", "0", "--pretrain", "lambda_global", "2"]
    assert cli.main(arguments) == 0
    out = Path(options["out"])
    table = (out / "table.md").read_text()
    assert all(f"| {init} | " in table for init in inits)
    files = [next((out / "pretrained").glob(f"{pattern}/run-*.yaml")) for pattern in ("siamese", "*none*", "*iou-0.3*")]
    plain, boxes, queries = (yaml.safe_load(file.read_text()) for file in files)
    differ = {name: boxes.get(name) for name in plain if plain[name] != boxes.get(name) and name != "out"}
    assert {name: value for name, value in differ.items() if value is not None} == {"discrimination": "none"}
    assert "lambda_global" in differ  # it has no effect there
    differ = {name: queries[name] for name in plain if plain[name] != queries[name] and name != "out"}
    assert differ == {"num_queries": 20, "short_sides": [80, 96], "iou": 0.3}
    assert plain["lambda_global"] == 2


def test_a_detector_of_another_family_may_be_among_them(options: dict[str, Any], tmp_path: Path) -> None:
    """PATH and PATH+siamese: its pre-training takes the family from the detector, not from the others."""
    sizes = {"hidden_size": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 12}
    detector = build_detector("detr", "random:resnet18", **sizes)
    detector.save(tmp_path / "coco", shortest_edge=96)
    path = str(tmp_path / "coco")
    result = run(options, inits=("backbone", path, f"{path}+siamese"), fractions=(1.0,), seeds=(0,))
    assert [cell.metrics["AP"] for cell in result.cells] == [0.1, 0.3, 0.3]
    (file,) = (Path(options["out"]) / "pretrained").glob("*/run-*.yaml")
    written = yaml.safe_load(file.read_text())
    assert (written.get("detector"), written["init"]) == (None, path)


def test_rows_with_self_training_and_the_control_of_equal_compute(options: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 12}
    for name in ("mine", "yours"):
        build_detector("detr", "random:resnet18", **sizes).save(tmp_path / name / "best", shortest_edge=96)
    mine, yours = (str(tmp_path / name / "best") for name in ("mine", "yours"))
    inits = ("backbone", "backbone+longer", "siamese", "siamese+self-training", f"{mine}+self-training", yours)
    budget = {"finetune": {"ema": 0.9, "steps": 30, "burn_in": 0.4}, "pretrain": {"steps": 12}}
    result = run(options, inits=inits, fractions=(1.0,), seeds=(0,), **budget)
    rows = [cell.init for cell in result.cells]
    assert rows == ["backbone", "backbone+longer", "siamese", "siamese+self-training", "mine+self-training", "yours"]
    assert [name for name in ran(options) if name.startswith("pre-training")] == ["pre-training siamese"]
    files = [next((Path(options["out"]) / cell.run).parent.glob("run-*.yaml")) for cell in result.cells]
    written = [yaml.safe_load(file.read_text()) for file in files]
    assert [run["steps"] for run in written] == [30, 42, 30, 30, 30, 30]
    images = str(Path(options["images"]))
    assert [run["unlabelled"] for run in written] == [None, None, None, images, images, None]
    assert [run.get("burn_in") for run in written] == [None, None, None, 0.4, 0.4, None]
    assert written[2]["model"] == written[3]["model"]


def test_a_recipe_is_changed_from_the_shell(options: dict[str, Any]) -> None:
    arguments = [*command(options), "--recipe", "laptop-methods"]
    arguments += ["--inits", "siamese", "--fractions", "1", "--seeds", "0"]
    arguments += ["--pretrain", "detector", "rt-detr", "detector_options", "{}"]
    assert cli.main(arguments) == 0
    out = Path(options["out"])
    pretrained = yaml.safe_load(next((out / "pretrained/siamese").glob("run-*.yaml")).read_text())
    finetuned = yaml.safe_load(next((out / "cells/siamese/1/0").glob("run-*.yaml")).read_text())
    expected = {"detector": "rt-detr", "detector_options": {}, "hidden_size": 128}
    assert {k: pretrained[k] for k in expected} == expected
    assert {k: finetuned[k] for k in ("epochs", "image_size")} == {"epochs": 2, "image_size": 192}
    assert pretrained["view_size"] == 192


def test_the_users_options_override_a_recipe(options: dict[str, Any]) -> None:
    given = {**options, "recipe": "laptop-methods", "inits": ("siamese",), "fractions": (1.0,)}
    config = apply_recipe(CompareConfig(**given, finetune_at={"1": {"epochs": 7}}))
    assert config.finetune_at == {"1": {"epochs": 7}}
    assert config.pretrain_at == {}  # the recipe's are for other initialisations
    for changes in ({"pretrain_at": {"siames": {}}}, {"finetune_at": {"0.1": {}}}, {"finetune_at": {"all": {}}}):
        with pytest.raises(UserError, match=r"not among inits|none of the fractions"):
            run(given, **changes)


def test_from_the_shell(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *command(options),
        "--inits",
        "backbone",
        "--fractions",
        "1",
        "--seeds",
        "0",
        "--finetune",
        "epochs",
        "2",
        "lr",
        "1e-3",
    ]
    assert cli.main(arguments) == 0
    assert ran(options) == ["fine-tuning backbone, 100 %, seed 0"]
    written = next((Path(options["out"]) / "cells/backbone/1/0").glob("run-*.yaml"))
    assert yaml.safe_load(written.read_text())["lr"] == 1e-3
    assert "10.0" in capsys.readouterr().err
