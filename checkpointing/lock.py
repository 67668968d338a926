"""Locks that keep two active runs from writing to the same checkpoint folder.

`FileLock` uses a file-system lock, which the kernel releases when the process ends for any reason.
`RecordLock` is for object stores and for file systems without locks. `RecordLock` uses a small
file, called the record, which its owner renews every `BEAT` seconds. If the record is not renewed
for `SILENCE` seconds, its owner is considered dead.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from errors import ConfigError, RunError, one_line

log = logging.getLogger(__name__)

# A run renews its lock record every `BEAT` seconds.
BEAT = 10.0
# After this many seconds without a renewal, the run that wrote the record is considered dead.
SILENCE = 30.0
# Seconds to wait after writing the record, in case another run overwrites it at the same time.
SETTLE = 1.0
NAME = ".lock"

_held: list[FileLock | RecordLock] = []


def release_locks() -> None:
    """Release every lock that this process holds."""
    while _held:
        _held.pop().release()


def describe_self(run_name: str | None) -> dict[str, Any]:
    """Describe this process as the owner of a lock, with its run, host and process ID."""
    owner = {"run": run_name, "host": socket.gethostname(), "pid": os.getpid()}
    return {**owner, "machine": _machine(), "token": uuid.uuid4().hex}


def _machine() -> str | None:
    """Return an ID for this boot of the machine and its PID namespace, or None if it is unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


class FileLock:
    """An exclusive lock on a folder in a file system.

    The lock is a POSIX record lock. Loader processes do not inherit the lock, so the kernel
    releases it when the process that holds it exits.

    Args:
        folder: Existing folder.
        owner: Description of the owner; see `describe_self`.

    Raises:
        ConfigError: Another process holds the lock.
        OSError: The file system does not support locks, or the folder is not writable.
    """

    def __init__(self, folder: str, owner: dict[str, Any]):
        self._path = os.path.join(folder, NAME)
        while True:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                content = os.pread(self._file, 4096, 0)
                os.close(self._file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _in_use(folder, _parse(content)) from None
                raise
            # If the previous owner removed the lock file in the meantime, try again. On NFS,
            # `fstat` and `stat` may then fail, because the file handle is stale.
            with suppress(OSError):
                if os.path.samestat(os.fstat(self._file), os.stat(self._path)):
                    break
            os.close(self._file)
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(owner).encode(), 0)
        _held.append(self)

    def check(self) -> None:
        """Do nothing, because no other run can take over this lock."""

    def release(self) -> None:
        """Remove the lock file and release the lock."""
        with suppress(OSError):
            os.remove(self._path)
        os.close(self._file)


class RecordLock:
    """An exclusive lock in the form of a small file, which its owner renews regularly.

    Args:
        place: Path or URI of the locked folder, for error messages.
        owner: Description of the owner; see `describe_self`.
        read: Function that returns the bytes of the record, or None if there is none.
        write: Function that replaces the record.

    Raises:
        ConfigError: Another active run holds the lock.
        Exception: `read` or `write` failed.
    """

    def __init__(
        self,
        place: str,
        owner: dict[str, Any],
        read: Callable[[], bytes | None],
        write: Callable[[bytes], None],
    ):
        self._place, self._owner, self._read, self._write = place, owner, read, write
        self._beat = 0
        self._successor: dict[str, Any] | None = None
        self._stopping = threading.Event()
        self._wait_for_silence()
        self._renew()
        time.sleep(SETTLE)
        found = self._record()
        if found and found.get("token") != owner["token"]:
            raise _in_use(place, found)
        threading.Thread(target=self._keep_renewing, daemon=True).start()
        _held.append(self)

    def check(self) -> None:
        """Raise a RunError if another run took over the lock while this run could not renew it."""
        if self._successor:
            raise RunError(
                f"{self._place}: stopping this run, because the folder was unreachable for "
                f"{SILENCE:.0f} s and {_describe(self._successor)} has taken it over"
            )

    def release(self) -> None:
        """Stop renewing the record, and mark it as released."""
        self._stopping.set()
        with suppress(Exception):  # If the store is down, the lock record simply expires.
            if not self._successor:
                self._write(json.dumps({**self._owner, "released": True}).encode())

    def _wait_for_silence(self) -> None:
        """Wait until the lock is free; raise ConfigError if an active run holds it."""
        first = self._record()
        end = time.monotonic() + SILENCE
        while (found := self._record()) and not found.get("released") and not _is_gone(found):
            if found != first:
                raise _in_use(self._place, found)
            if time.monotonic() > end:
                log.warning(
                    "%s: %s does not respond, so this run takes over its lock",
                    self._place,
                    _describe(found),
                )
                return
            time.sleep(min(1.0, SILENCE / 10))

    def _record(self) -> dict[str, Any] | None:
        content = self._read()
        return None if content is None else _parse(content)

    def _renew(self) -> None:
        self._beat += 1
        self._write(json.dumps({**self._owner, "beat": self._beat}).encode())

    def _keep_renewing(self) -> None:
        while not self._stopping.wait(BEAT):
            try:
                found = self._record()
                if found and found.get("token") != self._owner["token"]:
                    self._successor = found
                    return
                self._renew()
            # A store may raise any exception, so catch all.
            except Exception as error:
                log.info("%s: cannot renew the lock: %s", self._place, one_line(error))


def _is_gone(record: dict[str, Any]) -> bool:
    """Return whether a record's owner is this process, or a local process that has ended."""
    if record.get("machine") is None or record["machine"] != _machine():
        return False
    if record["pid"] == os.getpid():
        return True
    try:
        os.kill(record["pid"], 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _parse(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        record = json.loads(content)
        if isinstance(record, dict):
            return record
    return {}


def _describe(record: dict[str, Any]) -> str:
    if "pid" not in record:
        return "another run"
    return f"run {record['run'] or '(unnamed)'} (process {record['pid']} on {record['host']})"


def _in_use(place: str, record: dict[str, Any]) -> ConfigError:
    return ConfigError(
        f"save_folder: {_describe(record)} is writing to {place}; use a different save_folder, "
        "or stop that run first"
    )
