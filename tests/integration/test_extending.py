"""The package that docs/extending.md shows, installed and run as printed there."""

from __future__ import annotations

import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import siamese_detr
from siamese_detr import plugins
from siamese_detr.errors import UserError
from siamese_detr.pretext import build_pretext, find_pretext

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCK = re.compile(r"```(?:python|toml)\n# (\S+)\n(.*?)```", re.DOTALL)


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's files on sys.path, with the metadata that pip writes."""
    site = tmp_path / "site"
    (site / "toys").mkdir(parents=True)
    (site / "toys" / "__init__.py").touch()
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, text in files.items():
        (site / name).write_text(text)
    metadata = site / "toys-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    monkeypatch.syspath_prepend(site)
    plugins.load.cache_clear()
    yield
    plugins.load.cache_clear()
    for module in [name for name in sys.modules if name.split(".")[0] == "toys"]:
        del sys.modules[module]


@pytest.mark.usefixtures("toys")
def test_the_printed_package_pretrains(photos: Path, tmp_path: Path) -> None:
    """Its method, its proposals and its detector, by their names, in one run."""
    result = siamese_detr.pretrain(
        images=str(photos),
        out=str(tmp_path / "run"),
        method="first-match",
        proposal_method="grid",
        detector="small-conditional-detr",
        backbone="random:test_efficientnet",
        view_size=48,
        crop_size=32,
        batch_size=2,
        steps=2,
        log_every=1,
        workers=0,
        device="cpu",
        progress=False,
    )
    log = (result.out / "log.jsonl").read_text()
    assert result.steps == 2
    assert "loss_size" in log
    assert find_pretext("first-match").paper_regions == 3


@pytest.mark.usefixtures("toys")
def test_its_options_are_those_of_the_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In Python, in YAML and on the command line; beside another method they are unknown."""
    from siamese_detr import cli
    from siamese_detr.config import resolve, write_config
    from siamese_detr.training.pretrain_config import PretrainConfig

    given = {"images": "photos", "out": "run", "method": "first-match"}
    config = resolve(PretrainConfig, given | {"size_weight": 2.0})
    assert (config.pretext().size_weight, config.views().num_regions) == (2.0, 3)  # type: ignore[attr-defined]
    write_config(config, tmp_path / "options.yaml")
    assert resolve(PretrainConfig, {}, config=tmp_path / "options.yaml") == config
    (tmp_path / "part.yaml").write_text("size_weight: 2.0")
    for words in (["--size-weight", "2"], ["--config", str(tmp_path / "part.yaml")]):
        argv = ["photos", "run", "--method", "first-match", *words]
        assert cli.read_arguments("pretrain", PretrainConfig, argv) == config
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--method", "first-match", "--help"])
    assert "--size-weight" in capsys.readouterr().out
    for wrong, message in (({"method": "siamese", "size_weight": 2.0}, "size_weight"), ({"iou": 0.3}, "no effect")):
        with pytest.raises(UserError, match=message):
            resolve(PretrainConfig, given | wrong)


def test_a_broken_plugin_is_named(toys: None, tmp_path: Path) -> None:
    """Only those who ask for a name that is not built in see it."""
    (tmp_path / "site" / "toys" / "pretext.py").write_text("import no_such_module")
    importlib.invalidate_caches()
    find_pretext("siamese")
    with pytest.raises(UserError, match=r"package toys: its plug-in 'first-match' \(toys.pretext:FirstMatchConfig\)"):
        build_pretext("first-match", None)  # type: ignore[arg-type]
