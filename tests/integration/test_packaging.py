"""What is published is complete: wheel and source distribution build, and the wheel works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_wheel_and_source_distribution(tmp_path: Path) -> None:
    run("-m", "hatchling", "build", "-d", str(tmp_path / "dist"), cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (source,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "pyproject.toml", "src/siamese_detr/__init__.py"} <= names

    place = tmp_path / "installed"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(place), str(wheel), cwd=tmp_path)
    found = run("-c", "import siamese_detr; print(siamese_detr.__file__)", cwd=tmp_path, PYTHONPATH=str(place))
    assert found.strip().startswith(str(place))
    recipes = run("-m", "siamese_detr", "recipes", cwd=tmp_path, PYTHONPATH=str(place))
    assert "--recipe laptop" in recipes
    shipped = {file.relative_to(ROOT / "src") for file in (ROOT / "src").rglob("*") if file.is_file()}
    shipped = {file for file in shipped if file.suffix != ".pyc"}
    assert not [file for file in shipped if not (place / file).is_file()]


def test_the_citation_names_the_software_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["title"] == "siamese-detr"
    assert [reference["title"] for reference in citation["references"]] == ["Siamese DETR"]
