"""Plug-ins: entry points of other installed packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from siamese_detr import plugins
from siamese_detr.errors import UserError


def install(folder: Path, package: str, group: str, points: dict[str, str], code: str) -> None:
    """What pip would leave of a package of one module, in a folder of ``sys.path``."""
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"[{group}]", *(f"{name} = {module}:{value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def test_a_package_adds_a_component(tmp_path, monkeypatch):
    install(tmp_path, "good-package", "test.good", {"one": "One"}, "class One:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load("test.good")["one"].__name__ == "One"
    assert plugins.load("test.nothing") == {}


@pytest.mark.parametrize("code", ["raise ValueError('no luck')", "import missing_dependency", "Other = 1", "1 +"])
def test_a_broken_plugin_is_reported_with_its_package(tmp_path, monkeypatch, code):
    plugins.load.cache_clear()
    install(tmp_path, f"bad-package-{abs(hash(code))}", "test.bad", {"one": "One"}, code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"package bad-package-\d+: its plug-in 'one'.*update or uninstall"):
        plugins.load("test.bad")


def test_two_packages_cannot_use_one_name(tmp_path, monkeypatch):
    for package in ("first-package", "second-package"):
        install(tmp_path, package, "test.twice", {"one": "One"}, "One = 1")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"package (first|second)-package adds 'one'.*uninstall one"):
        plugins.load("test.twice")
