"""Being asked to stop."""

from __future__ import annotations

import signal

import pytest

from siamese_detr.runtime import signals
from siamese_detr.runtime.signals import StopRequest


def test_ctrl_c_asks_once_and_interrupts_the_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "ECHO", -1.0)
    before = signal.getsignal(signal.SIGINT)  # a shell lets its background jobs ignore it
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
