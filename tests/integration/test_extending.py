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


def test_a_broken_plugin_is_named(toys: None, tmp_path: Path) -> None:
    """Only those who ask for a name that is not built in see it."""
    (tmp_path / "site" / "toys" / "pretext.py").write_text("import no_such_module")
    importlib.invalidate_caches()
    find_pretext("siamese")
    with pytest.raises(UserError, match=r"package toys: its plug-in 'first-match' \(toys.pretext:FirstMatchConfig\)"):
        build_pretext("first-match", None)  # type: ignore[arg-type]
