"""Jobs that depend on each other: order, failures, parallel slots, stopping."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from siamese_detr.comparison.schedule import Job, device_slots, run_jobs


def job(name: str, code: str, folder: Path, *needs: str) -> Job:
    return Job(name, (sys.executable, "-S", "-c", code), folder / f"{name}.txt", needs)


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path: Path) -> None:
    ended_jobs = []
    jobs = [
        job("fine-tune a", "print('a')", tmp_path, "pre-train"),
        job("pre-train", "raise ValueError('no proposals')", tmp_path),
        job("fine-tune b", "print('b')", tmp_path),
    ]
    ended = run_jobs(jobs, [{}], lambda job, end: ended_jobs.append((job.name, end.outcome)))
    assert ended["pre-train"].outcome == "failed"
    assert "ValueError: no proposals" in ended["pre-train"].reason
    assert ended["fine-tune a"].outcome == "skipped"
    assert "no proposals" in ended["fine-tune a"].reason
    assert ended["fine-tune b"].outcome == "done"
    assert (tmp_path / "fine-tune b.txt").read_text() == "b\n"
    assert sorted(ended_jobs) == sorted((name, end.outcome) for name, end in ended.items())


def test_slots_confine_jobs_to_their_device(tmp_path: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    wait = f"""
import os, time
open({str(tmp_path)!r} + '/' + os.environ['CUDA_VISIBLE_DEVICES'], 'w')
end = time.time() + 60
while len([n for n in os.listdir({str(tmp_path)!r}) if n in '01']) < 2 and time.time() < end: time.sleep(.02)
assert time.time() < end
{show}
"""
    # Each waits until the other runs too: they end only if both slots are used at once.
    ended = run_jobs(
        [job("x", wait, tmp_path), job("y", wait, tmp_path)],
        [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}],
    )
    assert {end.outcome for end in ended.values()} == {"done"}
    assert sorted((tmp_path / f"{n}.txt").read_text() for n in "xy") == ["0\n", "1\n"]


def test_slots_follow_the_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots()] == ["3", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in device_slots(4)] == ["3", "5", "3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_slots() == [{}]


def test_a_result_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    def finished(job: Job, ended: object) -> None:
        if getattr(ended, "outcome", "") == "done":
            raise OSError("no metrics.json")

    assert run_jobs([job("a", "pass", tmp_path)], [{}], finished)["a"].reason == "no metrics.json"


@pytest.mark.parametrize(("needs", "message"), [({"a": "b"}, "no job"), ({"a": "b", "b": "a"}, "cycle")])
def test_needs_that_cannot_be_met_are_an_error(tmp_path: Path, needs: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_jobs([job(name, "pass", tmp_path, need) for name, need in needs.items()], [{}])


SCHEDULER = """
import sys
from pathlib import Path
from siamese_detr.comparison.schedule import Job, run_jobs
folder = Path(sys.argv[1])
child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(120)"
run_jobs([Job("a", (sys.executable, "-c", child), folder / "a.txt")], [{}])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_job_outlives_a_stopped_or_killed_scheduler(tmp_path: Path, number: signal.Signals) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells children of their parent's death")
    scheduler = subprocess.Popen([sys.executable, "-c", SCHEDULER, str(tmp_path)])
    output = tmp_path / "a.txt"
    deadline = time.monotonic() + 60
    while not (output.exists() and output.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child = int(output.read_text())
    scheduler.send_signal(number)
    code = scheduler.wait(60)
    assert code == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG_STEP = """
import sys, time
from siamese_detr.runtime.signals import StopRequest
with StopRequest() as stop:
    print("step", flush=True)
    while not stop.requested: time.sleep(.001)
    print("asked to stop", flush=True)
    time.sleep(float(sys.argv[1]))
    print("saved", flush=True)
"""


@pytest.mark.parametrize(("again_after", "step", "code"), [(0.0, 0.3, 0), (1.2, 60.0, -signal.SIGTERM)])
def test_a_request_to_stop_may_come_twice_at_once(again_after: float, step: float, code: int) -> None:
    """Linux tells the children of a killed process of several threads more than once, a millisecond apart: that is one
    request, which leaves time to save. A later one does not.
    """
    with subprocess.Popen([sys.executable, "-c", LONG_STEP, str(step)], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "step\n"
        job.terminate()
        assert job.stdout.readline() == "asked to stop\n"
        time.sleep(again_after)
        job.terminate()
        assert job.stdout.read() == ("" if code else "saved\n")
        assert job.wait(10) == code


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        # A zombie nobody has collected yet is as dead as can be.
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
