"""Tests of checkpointing/lock.py."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from checkpointing import lock
from checkpointing.lock import FileLock, describe_self, release_locks
from checkpointing.stores import LocalFolder, NewCheckpoint
from errors import ConfigError, RunError
from tests.support.lock import (
    Place,
    other_process,
    quick,  # noqa: F401
    wait_for_takeover,
)


def test_file_lock_is_released_despite_surviving_loader_processes(tmp_path: Path) -> None:
    def write_and_fork() -> None:
        FileLock(str(tmp_path), describe_self("first"))
        if os.fork() == 0:  # a stand-in for a loader process that outlives the run
            time.sleep(5)
            os._exit(0)

    line = r"run first \(process \d+ on \S+\) is writing to"
    with other_process(write_and_fork), pytest.raises(ConfigError, match=line):
        FileLock(str(tmp_path), describe_self("second"))
    FileLock(str(tmp_path), describe_self("second"))


def test_released_file_lock_leaves_no_file(tmp_path: Path) -> None:
    FileLock(str(tmp_path), describe_self("first"))
    release_locks()
    assert os.listdir(tmp_path) == []
    with other_process(lambda: FileLock(str(tmp_path), describe_self("second"))):
        assert os.listdir(tmp_path) == [lock.NAME]


def test_file_lock_is_taken_although_its_file_was_removed_on_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = iter([OSError(errno.ESTALE, "Stale file handle")])
    fstat = os.fstat

    def stale_once(file: int) -> os.stat_result:
        for error in outcomes:
            raise error
        return fstat(file)

    monkeypatch.setattr(os, "fstat", stale_once)
    FileLock(str(tmp_path), describe_self("first"))
    assert b"first" in (tmp_path / lock.NAME).read_bytes()


def test_second_run_is_rejected_while_the_lock_record_is_renewed() -> None:
    place = Place()
    first = place.lock("first")
    with pytest.raises(ConfigError, match=r"run first \(process 1 on .*\) is writing to s3://x"):
        place.lock("second")
    first.release()
    place.lock("second")


def test_exactly_one_of_two_simultaneous_runs_gets_the_lock() -> None:
    place, outcomes = Place(), []

    def start(name: str) -> None:
        try:
            place.lock(name)
            outcomes.append("goes on")
        except ConfigError:
            outcomes.append("is refused")

    threads = [threading.Thread(target=start, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["goes on", "is refused"]


def test_run_stops_if_another_run_has_taken_its_lock() -> None:
    place = Place()
    first = place.lock("first")
    place.content = b'{"run": "second", "pid": 7, "host": "b", "token": "other"}'
    wait_for_takeover()
    with pytest.raises(RunError, match=r"run second \(process 7 on b\) has taken it over"):
        first.check()
    first.release()
    assert b"second" in place.content


def test_lock_takeover_is_detected_without_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    target = LocalFolder(str(tmp_path))
    target.lock("first")
    (tmp_path / lock.NAME).write_text('{"run": "second", "pid": 7, "host": "b", "token": "other"}')
    wait_for_takeover()
    (tmp_path / "new").write_bytes(b"new")
    with pytest.raises(RunError, match=r"run second \(process 7 on b\) has taken it over"):
        target.publish(NewCheckpoint(str(tmp_path / "new"), "ep0-ba2-rank0.pt", keep=1))
    assert target.names() == []
