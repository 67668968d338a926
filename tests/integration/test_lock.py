"""One live run writes into a folder; a dead one does not keep the next from it."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing import lock
from checkpointing.stores import LocalFolder
from errors import ConfigError
from tests.support.lock import (
    Place,
    other_process,
    quick,  # noqa: F401
)


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        pytest.param({}, 5.0, id="a run of another host, after a silence"),
        pytest.param({"machine": lock._machine(), "pid": 2**22}, 0.5, id="one of this host"),
        pytest.param({"machine": lock._machine(), "pid": os.getpid()}, 0.5, id="this process"),
    ],
)
def test_the_record_of_a_dead_run_is_taken_over(changes: dict[str, Any], most: float) -> None:
    place = Place()
    place.lock("first", **changes)._stopping.set()  # without a word, as a killed one
    time.sleep(0.2)
    began = time.monotonic()
    second = place.lock("second")
    assert time.monotonic() - began < most
    second.check()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_has_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    first = other_process(lambda: LocalFolder(str(tmp_path)).lock("first"))
    with first, pytest.raises(ConfigError, match="run first"):
        LocalFolder(str(tmp_path)).lock("second")
    LocalFolder(str(tmp_path)).lock("second")
