"""Pre-emption: stop cleanly when asked to."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit code (EX_TEMPFAIL) of a run that saved itself on SIGTERM or SIGUSR1: start it again with ``--resume``."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))

ECHO = 1.0
"""Seconds in which a signal again is the same request: Linux may tell the children of a process with several threads
more than once that it was killed."""


class Preempted(SystemExit):
    """The run was asked to stop, and has saved itself; exit code :data:`EXIT_PREEMPTED`."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, SIGTERM and SIGUSR1 end the command at once by :class:`Preempted`, but in a :class:`StopRequest`. What is
    outside of the training steps (starting, proposals, a bank of features, the last evaluation) goes on where it was.

    Not where there are several processes: one that waits for another, in C, would not hear of the signal; they just
    end, and the launcher has an exit code of its own.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Preempted(
            f"{signal.Signals(number).name}: stopped; the same command goes on (with --resume, where it has that)"
        )

    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if not alone or threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    previous = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class StopRequest:
    """Context in which SIGTERM, SIGUSR1 and Ctrl-C only set ``requested``; one that comes later than :data:`ECHO` after
    the first ends the process.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._previous = {number: signal.signal(number, self._note) for number in (*SIGNALS, signal.SIGINT)}
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, now
        elif now - self._since > ECHO:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)


def ignore_signals() -> None:
    """In a data process: clusters and terminals signal whole groups, and it must outlive the step being finished.

    Only its parent ends it by SIGTERM, having waited in vain; else a process that hangs would keep it from ending.
    """
    for number in (*SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux: tells who sends
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os.kill(os.getpid(), signal.SIGKILL)
