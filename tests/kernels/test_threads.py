"""Parts of work done on PyTorch's threads."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from siamese_detr.kernels import threads
from siamese_detr.kernels.threads import on_all_threads


@pytest.fixture(params=["OpenMP", "threads of Python's"], autouse=True)
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "OpenMP":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("PyTorch brings no OpenMP")
    else:
        assert threads._openmp() is not None


def work_of(count: int) -> tuple[list[int], set[int]]:
    done, by = [], set()

    def work(part: int) -> None:
        time.sleep(0.02)
        done.append(part)
        by.add(threading.get_ident())

    on_all_threads(work, (part for part in range(2 * count)), count)
    return sorted(done), by


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_part_is_done_once_by_as_many_threads_as_asked_for(count: int) -> None:
    done, by = work_of(count)
    assert done == list(range(2 * count))
    assert len(by) == count
    assert threading.get_ident() in by or (count > 1 and threads._openmp() is None)


def test_the_threads_are_pytorchs() -> None:
    if threads._openmp() is None:
        pytest.skip("PyTorch brings no OpenMP")
    before, by = torch.get_num_threads(), set()
    torch.set_num_threads(3)
    try:
        torch.rand(1 << 20).sin()
        there = {int(task.name) for task in Path("/proc/self/task").iterdir()}
        on_all_threads(lambda part: (time.sleep(0.02), by.add(threading.get_native_id())), range(6))
    finally:
        torch.set_num_threads(before)
    assert len(by) == 3
    assert by <= there


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_signal_raises_is_raised(count: int) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def work_until_signalled(delay: float) -> None:
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGUSR2))
        timer.start()
        while timer.is_alive():
            on_all_threads(lambda part: sum(range(2000)), range(4), count)
        time.sleep(0.1)  # the handler is run here at the latest

    before = signal.signal(signal.SIGUSR2, stop)
    try:
        for n in range(100):  # at whatever point it comes
            with pytest.raises(Stop):
                work_until_signalled(n * 1e-4)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert work_of(2)[0] == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_wrong_in_a_thread_is_raised(count: int) -> None:
    def work(part: int) -> None:
        time.sleep(0.01)
        if part == 3:
            raise KeyError(part)

    with pytest.raises(KeyError, match="3"):
        on_all_threads(work, range(4), count)
    assert work_of(2)[0] == [0, 1, 2, 3]  # and the threads are there for what comes next


def test_callers_do_not_wait_for_each_other() -> None:
    meet = threading.Barrier(2, timeout=20)

    def work(part: int) -> None:
        if part == 0:
            meet.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: on_all_threads(work, range(3), 2), range(2)))


def test_no_parts() -> None:
    on_all_threads(lambda part: pytest.fail("called"), [], 2)
