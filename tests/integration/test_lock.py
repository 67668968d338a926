"""A folder has one live run; the lock of a dead run does not block the next run."""

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
        pytest.param({}, 5.0, id="other host after a silence"),
        pytest.param(
            {"machine": lock._machine(), "pid": 2**22}, 0.5, id="dead process of this host"
        ),
        pytest.param({"machine": lock._machine(), "pid": os.getpid()}, 0.5, id="this process"),
    ],
)
def test_lock_record_of_dead_run_is_taken_over(changes: dict[str, Any], most: float) -> None:
    place = Place()
    place.lock("first", **changes)._stopping.set()  # like a killed run
    time.sleep(0.2)
    began = time.monotonic()
    second = place.lock("second")
    assert time.monotonic() - began < most
    second.check()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_uses_lock_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    first = other_process(lambda: LocalFolder(str(tmp_path)).lock("first"))
    with first, pytest.raises(ConfigError, match="run first"):
        LocalFolder(str(tmp_path)).lock("second")
    LocalFolder(str(tmp_path)).lock("second")
