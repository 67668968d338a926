"""Watches of three ranks in one process, and the exit statuses and causes that they report."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as torch_dist

from training import watch
from training.watch import Watch


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replace `os._exit`; return the list of the exit statuses that watches pass to it."""
    statuses: list[int] = []
    monkeypatch.setattr("training.watch.os._exit", statuses.append)
    monkeypatch.setattr(watch, "GRACE", 0.2)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    return statuses


@pytest.fixture
def three(exits: list[int]) -> Iterator[list[Watch]]:
    """The watches of three ranks in one process."""
    store = torch_dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        watches = list(threads.map(lambda rank: Watch(store, rank, 3), range(3)))
    yield watches
    close(watches, 0)


def close(watches: list[Watch], status: int) -> None:
    """Close all watches, and wait for those that may be about to call the replaced `os._exit`."""
    for one in watches:
        one.close(status)
    for one in watches:
        if one.cause(0):
            one._thread.join()


def causes(watches: list[Watch]) -> list[tuple[str, int]]:
    """Return the cause of the end, with its exit status, that each watch has received."""
    heard = [one.cause(10) for one in watches]
    return [(str(cause), cause.status) for cause in heard if cause]
