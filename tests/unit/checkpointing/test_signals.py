"""Tests of checkpointing/signals.py."""

from __future__ import annotations

import os
import signal

import pytest

from checkpointing import signals
from checkpointing.signals import SignalListener
from errors import SIGNALS


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_repeated_by_the_launcher_counts_only_once(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    listener = SignalListener()
    before = signal.getsignal(number)
    with listener.listening():
        signal.raise_signal(number)  # the scheduler's signal
        signal.raise_signal(number)  # the launcher's copy of the signal
        assert listener.received_signal == number.name
        assert callable(signal.getsignal(number))
        # The same signal ends the process if it arrives again some seconds later.
        ended: list[int] = []
        monkeypatch.setattr(signals, "ECHO", 0.0)
        monkeypatch.setattr(signals.time, "monotonic", lambda: float("inf"))
        monkeypatch.setattr(signal, "raise_signal", ended.append)
        os.kill(os.getpid(), number)
        assert ended == [number] and signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_sighup_is_not_handled_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    with SignalListener().listening():
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
