"""Logs of a run: whatever a kill leaves of a line, the other records are there."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from limits import largest_file
from siamese_detr.files import clean
from siamese_detr.runtime.journal import Journal, JsonLines
from siamese_detr.runtime.rundir import record_session, sessions

pytestmark = pytest.mark.promise("logs")


@pytest.mark.parametrize("left", range(0, 40, 3))
def test_a_line_cut_short_costs_one_record(tmp_path: Path, left: int) -> None:
    """Killed after any number of bytes of the second record, then continued."""
    file = tmp_path / "log.jsonl"
    lines = JsonLines(file)
    lines.append([{"step": 1, "loss": 0.1 + 0.2}])
    second = json.dumps({"step": 2, "loss": 1 / 3}) + "\n"
    with open(file, "a") as stream:
        stream.write(second[:left])
    lines.append([{"step": 3, "loss": 3.0}, {"step": 4, "loss": 4.0}])
    steps = [1, 2, 3, 4] if left >= len(second) - 1 else [1, 3, 4]
    assert [record["step"] for record in lines.read()] == steps
    assert lines.read()[0]["loss"] == 0.1 + 0.2
    assert [record["step"] for record in lines.rewind(3)] == steps[:-1]
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == steps[:-1]


def test_no_damage_stops_reading(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'\xff\xfe\x00\n{"step": 1}\n12\nnull\n' + b"[" * 100_000 + b'\n{"no step": 1}\n{"step": 2}\n')
    lines = JsonLines(file)
    assert lines.rewind(2) == [{"step": 1}, {"step": 2}] == lines.read()
    assert JsonLines(tmp_path / "none.jsonl").rewind(3) == []
    assert not (tmp_path / "none.jsonl").exists()


def test_what_a_kill_leaves_of_a_rewound_log_is_cleaned_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log.jsonl"
    lines = JsonLines(file)
    lines.append([{"step": 1}, {"step": 2}])
    killed = tmp_path / "killed"
    monkeypatch.setattr(os, "fsync", lambda descriptor: shutil.copytree(tmp_path, killed))
    lines.rewind(1)
    assert len(list(killed.iterdir())) == 2
    clean(killed)
    assert JsonLines(killed / "log.jsonl").read() == [{"step": 1}, {"step": 2}]
    assert len(list(killed.iterdir())) == 1


def test_the_death_of_tensorboards_thread_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the board is made: what it died of is raised."""
    reported: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    with largest_file(5), pytest.raises(OSError, match="large"):
        Journal(tmp_path)
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard."):
            thread.join(10)
    assert reported == []


def test_sessions_survive_a_torn_line(tmp_path: Path) -> None:
    record_session(tmp_path, images=3)
    with open(tmp_path / "sessions.jsonl", "a") as stream:
        stream.write('{"started": "2026')
    record_session(tmp_path, images=4)
    assert [session["images"] for session in sessions(tmp_path)] == [3, 4]
