"""Only one live run may use a save folder; the lock of a dead run does not block the next run."""

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
    ("changes", "waits"),
    [
        pytest.param({}, True, id="silent run on another host"),
        pytest.param(
            {"machine": lock._machine(), "pid": 2**22}, False, id="dead process of this host"
        ),
        pytest.param(
            {"machine": lock._machine(), "pid": os.getpid()},
            False,
            id="earlier run of this process",
        ),
    ],
)
def test_new_run_takes_over_lock_of_dead_run(
    changes: dict[str, Any], waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    place = Place()
    place.lock("first", **changes)._stopping.set()  # as if the run had been killed
    time.sleep(0.2)
    place.lock("second").check()
    assert ("does not respond, so this run takes over its lock" in caplog.text) is waits


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_uses_lock_record_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    first = other_process(lambda: LocalFolder(str(tmp_path)).lock("first"))
    with first, pytest.raises(ConfigError, match="run first"):
        LocalFolder(str(tmp_path)).lock("second")
    LocalFolder(str(tmp_path)).lock("second")
