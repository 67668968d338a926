"""Signals that ask a run to stop after the batch in progress."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from composer.core import State
from composer.utils import dist

from errors import SIGNALS

# Seconds in which a launcher passes on a signal that a scheduler also sent to this process itself.
ECHO = 5.0


class SignalListener:
    """Remembers that this process got one of `SIGNALS`; the same one again ends it at once.

    Under a launcher, a signal that comes again within `ECHO` seconds counts once.
    """

    def __init__(self) -> None:
        self.received_signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within, catch the signals; without effect outside of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        times: dict[int, float] = {}  # when each signal came first
        echo = ECHO if "LOCAL_RANK" in os.environ else 0.0

        def receive(number: int, frame: Any) -> None:
            if number in times:
                if time.monotonic() - times[number] >= echo:
                    signal.signal(number, signal.SIG_DFL)
                    signal.raise_signal(number)
                return
            times[number] = time.monotonic()
            self.received_signal = signal.Signals(number).name
            line = f"{self.received_signal}: saving a checkpoint after this batch\n"
            # Not print: the signal may have come within one. The terminal may be closed by now.
            with suppress(OSError):
                os.write(2, line.encode())

        # Under nohup, SIGHUP stays ignored.
        numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def any_process_signalled(self, state: State) -> bool:
        """Return whether any process got a signal; for all processes together."""
        if dist.get_world_size() == 1:
            return self.received_signal is not None
        received = torch.tensor([int(self.received_signal is not None)])
        received = state.device.tensor_to_device(received)
        dist.all_reduce(received, "MAX")
        return bool(received.item())
