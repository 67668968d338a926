"""One live run writes into a folder; a dead one does not keep the next from it."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.s3_server import S3Server, s3_server
from checkpointing import lock
from checkpointing.lock import FileLock, RecordLock, describe_self, release_locks
from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import LocalFolder
from errors import ConfigError, RunError
from main import main


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


def test_a_file_lock_ends_with_its_process_and_not_with_its_loaders(tmp_path: Path) -> None:
    def write_and_fork() -> None:
        FileLock(str(tmp_path), describe_self("first"))
        if os.fork() == 0:  # as a loader process, which may outlive the run
            time.sleep(5)
            os._exit(0)

    line = r"run first \(process \d+ on \S+\) is writing to"
    with other_process(write_and_fork), pytest.raises(ConfigError, match=line):
        FileLock(str(tmp_path), describe_self("second"))
    FileLock(str(tmp_path), describe_self("second"))


def test_a_released_file_lock_leaves_nothing(tmp_path: Path) -> None:
    FileLock(str(tmp_path), describe_self("first"))
    release_locks()
    assert os.listdir(tmp_path) == []
    with other_process(lambda: FileLock(str(tmp_path), describe_self("second"))):
        assert os.listdir(tmp_path) == [lock.NAME]


class Place:
    """A store of one record."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def lock(self, run: str, **changes: Any) -> RecordLock:
        owner = describe_self(run) | {"pid": 1, "machine": f"the host of {run}", **changes}
        return RecordLock("s3://x", owner, lambda: self.content, self.write)

    def write(self, content: bytes) -> None:
        self.content = content


def test_a_record_that_is_renewed_refuses_another_run() -> None:
    place = Place()
    first = place.lock("first")
    with pytest.raises(ConfigError, match=r"run first \(process 1 on .*\) is writing to s3://x"):
        place.lock("second")
    first.release()
    place.lock("second")


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


def test_of_two_runs_that_start_together_one_goes_on() -> None:
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


def test_a_run_that_was_cut_off_stops_when_another_has_taken_over() -> None:
    place = Place()
    first = place.lock("first")
    place.content = b'{"run": "second", "pid": 7, "host": "b", "token": "other"}'
    time.sleep(0.5)
    with pytest.raises(RunError, match=r"run second \(process 7 on b\) has taken over the folder"):
        first.check()
    first.release()
    assert b"second" in place.content


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


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.trains
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_a_second_run_is_refused_while_the_first_lives(
    tiny: dict[str, Any], tmp_path: Path, server: S3Server, kind: str
) -> None:
    folder = f"{tmp_path}/saved" if kind == "folder" else "s3://data/locked"
    target = LocalFolder(folder) if kind == "folder" else RemoteFolder(folder)
    tiny |= {"save_folder": folder, "max_duration": "1ba", "eval_interval": "9ep"}
    with other_process(lambda: target.lock("tiny")) as pid:
        with pytest.raises(ConfigError) as caught:
            main(tiny)
        assert f"save_folder: run tiny (process {pid} on " in str(caught.value)
        assert "is writing to" in str(caught.value)
        assert target.names() == []
    main({**tiny, "autoresume": True})  # the first was killed
    assert target.names() == ["ep0-ba1-rank0.pt"]
    with other_process(lambda: target.lock("tiny")):  # the run has released the folder
        pass


def test_a_folder_without_locks_stops_a_run_that_was_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    target = LocalFolder(str(tmp_path))
    target.lock("first")
    (tmp_path / lock.NAME).write_text('{"run": "second", "pid": 7, "host": "b", "token": "other"}')
    time.sleep(0.5)
    (tmp_path / "new").write_bytes(b"new")
    with pytest.raises(RunError, match=r"run second \(process 7 on b\) has taken over the folder"):
        target.publish(str(tmp_path / "new"), "ep0-ba2-rank0.pt", keep=1)
    assert target.names() == []
