"""Lock records in a store, locks that expire fast, and another process that may hold one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from checkpointing import lock
from checkpointing.lock import RecordLock, describe_self, release_locks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make locks expire within a second."""
    for name, seconds in {"BEAT": 0.1, "SILENCE": 0.6, "SETTLE": 0.2}.items():
        monkeypatch.setattr(lock, name, seconds)
    yield
    release_locks()


@contextmanager
def other_process(function: Callable[[], Any]) -> Iterator[int]:
    """Call a function in a forked process, which then waits; yield its process id."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        function()
        os.write(write, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def wait_for_takeover() -> None:
    """Wait until the only lock of this process has noticed that another run took it over."""
    (held,) = lock._held
    assert isinstance(held, RecordLock)
    deadline = time.monotonic() + 20
    while not held._successor and time.monotonic() < deadline:
        time.sleep(0.01)


class Place:
    """A store with one lock record."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def lock(self, run: str, **changes: Any) -> RecordLock:
        owner = describe_self(run) | {"pid": 1, "machine": f"the host of {run}", **changes}
        return RecordLock("s3://x", owner, lambda: self.content, self.write)

    def write(self, content: bytes) -> None:
        self.content = content
