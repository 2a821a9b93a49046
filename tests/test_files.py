"""Results are written aside: what a kill or a full disk leaves is the old file or the new one."""

from __future__ import annotations

from pathlib import Path

import pytest

from siamese_detr.files import clean, write_json, write_text
from test_checkpoint import largest_file


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    file = tmp_path / "predictions.json"
    write_json(file, {"boxes": [1]})
    with largest_file(10_000), pytest.raises(OSError, match="large"):
        write_text(file, "x" * 20_000)
    assert file.read_text() == '{\n "boxes": [\n  1\n ]\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_kill_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".writing-best-x").mkdir()
    (tmp_path / ".writing-best-x" / "model.safetensors").write_text("half")
    (tmp_path / ".writing-table.md").write_text("half")
    (tmp_path / "best").mkdir()
    (tmp_path / ".removing-link").symlink_to(tmp_path / "best")
    clean(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "best"]
