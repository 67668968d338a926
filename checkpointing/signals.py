"""Handling of signals that ask a run to stop after the batch in progress."""

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

# Ignore repeats of a signal within this many seconds, because the scheduler and the launcher may
# both send it to this process.
ECHO = 5.0


class SignalListener:
    """A listener for stop signals that ends the process if a second signal arrives.

    Under a launcher, a signal that arrives twice within `ECHO` seconds counts as one signal.
    """

    def __init__(self) -> None:
        self.received_signal: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals within this context; do nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        times: dict[int, float] = {}  # Time at which each signal first arrived.
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
            # Do not call print(), because the signal may have interrupted another print(). Suppress
            # errors, because the terminal may already be closed.
            with suppress(OSError):
                os.write(2, line.encode())

        # Signals that are already ignored, such as SIGHUP under nohup, stay ignored.
        numbers = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def any_process_signalled(self, state: State) -> bool:
        """Return whether any rank received a signal; all ranks must call this together."""
        if dist.get_world_size() == 1:
            return self.received_signal is not None
        received = torch.tensor([int(self.received_signal is not None)])
        received = state.device.tensor_to_device(received)
        dist.all_reduce(received, "MAX")
        return bool(received.item())
