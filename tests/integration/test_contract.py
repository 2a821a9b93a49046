"""The structure of the code: who may import whom, and how large a file or a folder may become."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "siamese_detr"
FOLDERS = [SOURCE, *(path for path in SOURCE.iterdir() if (path / "__init__.py").is_file())]


def test_imports_go_downwards_and_in_no_circle() -> None:
    """The order of the packages stands in pyproject.toml, and in docs/architecture.md with the reasons."""
    linter = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    run = subprocess.run([sys.executable, "-c", linter], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folders_and_files_stay_small(folder: Path) -> None:
    files = list(folder.glob("*.py"))
    assert len(files) <= 18
    assert [path.name for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 400] == []


def test_tests_mirror_the_packages() -> None:
    packages = {folder.name for folder in FOLDERS[1:]} - {"recipes"}
    assert packages <= {path.name for path in (ROOT / "tests").iterdir()}
