"""Where checkpoints are kept: a folder or an object store, in which each is whole or not there.

A checkpoint gets its name only when all of it is on the disk or in the store, `best-rank0.pt` and
`latest-rank0.pt` point at it only then, and only after that an old one goes.

Composer's own saver writes into the file that it replaces, removes `latest-rank0.pt` before it
makes the new one, forgets old checkpoints when a run resumes, never removes any from an object
store, and gives up on a store that is away for some seconds.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast

from composer.utils import maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore, S3ObjectStore

from checkpointing.lock import NAME as LOCK
from checkpointing.lock import FileLock, RecordLock, describe_self
from errors import RunError, WeightsError, one_line

log = logging.getLogger(__name__)

LATEST, BEST = "latest-rank0.pt", "best-rank0.pt"
NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
UPLOAD_FOR = 3600.0  # seconds to go on trying to upload a checkpoint
# What file systems without symbolic links answer, such as exFAT and some mounted buckets.
NO_SYMLINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


def batch_of(name: str) -> int:
    """Return the number of batches that a checkpoint's name says; -1 for other names."""
    return time_of(name)[0]


def time_of(name: str) -> tuple[int, int]:
    """Return the numbers of batches and epochs that a checkpoint's name says; -1 for other names.

    An epoch's last batch may have two checkpoints, the later one of after the epoch's evaluation.
    """
    match = NAME.fullmatch(name)
    return (int(match[2]), int(match[1])) if match else (-1, -1)


def _newest_first(names: Iterable[str]) -> list[str]:
    """Return the names that are checkpoints', the newest first."""
    return sorted((name for name in names if NAME.fullmatch(name)), key=time_of, reverse=True)


def checkpoint_in(path: str | os.PathLike[str]) -> str:
    """Return the path of a checkpoint's file.

    Args:
        path: The file, or a pointer in a file system without links, or a run's folder: its best
            checkpoint if it has one, and its newest otherwise. Or a folder of `save_pretrained`.

    Raises:
        WeightsError: The folder holds none.
    """
    if not os.path.isdir(path):
        folder, name = os.path.split(path)
        pointed = None if os.path.exists(path) else LocalFolder(folder or ".").pointed(name)
        return os.path.join(folder, pointed) if pointed else os.fspath(path)
    folder = LocalFolder(os.fspath(path))
    newest = folder.names()[:1]
    saved = ("model.safetensors", "pytorch_model.bin")  # by save_pretrained, and `--to hub`
    for name in (BEST, folder.pointed(BEST), LATEST, folder.pointed(LATEST), *newest, *saved):
        if name and os.path.exists(found := os.path.join(path, name)):
            return found
    raise WeightsError(f"{path}: a folder without checkpoints; name a file, or a run's save_folder")


class LocalFolder:
    """Checkpoints in a folder of this machine or of a shared file system.

    Args:
        path: The folder.
    """

    def __init__(self, path: str):
        self.path = self.scratch = path
        self._run_lock: FileLock | RecordLock | None = None

    def lock(self, run_name: str | None) -> None:
        """Lock the folder for this process, until it ends or calls `release_locks`.

        Raises:
            ConfigError: Another live run writes to the folder.
            OSError: It cannot be written.
        """
        os.makedirs(self.path, exist_ok=True)
        owner, path = describe_self(run_name), os.path.join(self.path, LOCK)
        try:
            self._run_lock = FileLock(self.path, owner)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise

            def read() -> bytes | None:
                with suppress(FileNotFoundError):
                    return Path(path).read_bytes() or None
                return None

            self._run_lock = RecordLock(
                self.path, owner, read, lambda text: _write_over(path, text)
            )

    def probe(self) -> None:
        """Do on small files what a save does; raise an OSError if something of it fails."""
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".probe-") as file:
            file.write(b"probe")
            file.flush()
        for name in ("first", "second"):
            self._point(".probe", name)
        self._unpoint(".probe")
        self._sync()

    def remove_unfinished(self) -> None:
        """Remove what a killed run left half written."""
        for path in glob.glob(os.path.join(glob.escape(self.path), "ep*-rank0.pt.unfinished")):
            os.remove(path)

    def names(self) -> list[str]:
        """Return the checkpoints, newest first."""
        return _newest_first(os.listdir(self.path) if os.path.isdir(self.path) else [])

    def latest(self) -> str | None:
        """Return the name of the checkpoint that was published last."""
        return self.pointed(LATEST)

    def pointed(self, pointer: str) -> str | None:
        """Return the name of the checkpoint that a pointer names, by link or by text."""
        path = os.path.join(self.path, pointer)
        with suppress(OSError):
            return os.path.basename(os.readlink(path))
        with suppress(OSError, UnicodeDecodeError):
            return os.path.basename(Path(f"{path}.symlink").read_text().strip())
        return None

    def fetch(self, name: str, scratch: str) -> str:
        """Return the local path of a checkpoint.

        Raises:
            FileNotFoundError: The file is not on this machine.
        """
        path = os.path.join(self.path, name)
        os.stat(path)
        return path

    def publish(
        self,
        unfinished: str,
        name: str,
        keep: int,
        best: str | None = None,
        own: Container[str] = (),
    ) -> None:
        """Give a finished file its name, and point `latest` at it.

        Then remove the checkpoints in `own`, except for the newest `keep` and `best`. Each step is
        one rename, so whenever the machine fails, `latest` is a whole checkpoint.

        Raises:
            RunError: Another run has taken over the folder.
        """
        if self._run_lock:
            self._run_lock.check()
        os.replace(unfinished, os.path.join(self.path, name))
        self._sync()
        if best:
            self.point_best(best)
        self._point(LATEST, name)
        self._sync()
        for old in outdated(self.names(), name, keep, best, own):
            os.remove(os.path.join(self.path, old))

    def point_best(self, name: str | None) -> None:
        """Point `best-rank0.pt` at a checkpoint, or remove it."""
        if name:
            self._point(BEST, name)
        else:
            self._unpoint(BEST)

    def _point(self, pointer: str, name: str) -> None:
        """Make a link, or where there are no links, the text file that object stores have."""
        path = os.path.join(self.path, pointer)
        link = f"{path}.unfinished"
        with suppress(FileNotFoundError):
            os.remove(link)
        try:
            os.symlink(name, link)
        except OSError as error:
            if error.errno not in NO_SYMLINKS:
                raise
            _write_over(f"{path}.symlink", name.encode())
        else:
            os.replace(link, path)

    def _unpoint(self, pointer: str) -> None:
        for name in (pointer, f"{pointer}.symlink"):
            Path(self.path, name).unlink(missing_ok=True)

    def _sync(self) -> None:
        """Have the folder's entries on the disk."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:  # some file systems sync files, but no folders
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(folder)

    def wait(self, seconds: float) -> bool:
        """Whether all that was published is there, after waiting for it."""
        return True


class Upload(NamedTuple):
    """A checkpoint on its way to an object store."""

    file: str
    name: str
    keep: int
    best: str | None
    own: Container[str]


class RemoteFolder:
    """Checkpoints in an object store, uploaded while training goes on.

    An upload that fails is tried again for an hour. A checkpoint that a newer one overtakes before
    its upload has begun, or while it fails, is dropped unless it is the best, so at most three wait
    on the local disk.

    Args:
        uri: Such as s3://bucket/folder.
    """

    def __init__(self, uri: str):
        backend, bucket, folder = parse_uri(uri)
        self.path, self.prefix = uri.rstrip("/"), f"{folder.strip('/')}/".lstrip("/")
        if backend == "s3":  # botocore's defaults take five minutes to find that nobody answers
            config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}}
            self.store: ObjectStore = S3ObjectStore(bucket, client_config=config)
        else:
            self.store = cast(ObjectStore, maybe_create_object_store_from_uri(uri))
        self._folder = tempfile.TemporaryDirectory(prefix="checkpoints-")
        self.scratch = self._folder.name
        self._run_lock: RecordLock | None = None
        self._lock = threading.Condition()
        self._waiting: list[Upload] = []
        self._count = 0
        self._busy = False
        self._failed: RunError | None = None

    def lock(self, run_name: str | None) -> None:
        """Lock the folder for this process, until it ends or calls `release_locks`.

        Raises:
            ConfigError: Another live run writes to the folder.
            Exception: What the store's client raises.
        """

        def read() -> bytes | None:
            path = os.path.join(self.scratch, "lock-read")
            try:
                self.store.download_object(f"{self.prefix}{LOCK}", path, overwrite=True)
            except FileNotFoundError:
                return None
            return Path(path).read_bytes()

        def write(text: bytes) -> None:
            path = os.path.join(self.scratch, "lock-write")
            Path(path).write_bytes(text)
            self.store.upload_object(f"{self.prefix}{LOCK}", path)

        self._run_lock = RecordLock(self.path, describe_self(run_name), read, write)

    def remove_unfinished(self) -> None:
        """Do nothing: an object appears whole."""

    def probe(self) -> None:
        """Raise what the store's client does unless objects can be written."""
        with tempfile.NamedTemporaryFile() as file:
            self.store.upload_object(f"{self.prefix}.probe", file.name)
        self._delete(".probe")

    def names(self) -> list[str]:
        """Return the checkpoints, newest first."""
        names = (key.partition(self.prefix)[2] for key in self.store.list_objects(self.prefix))
        return _newest_first(names)  # and none of the folders below it

    def latest(self) -> str | None:
        """Return the name of the checkpoint that was published last."""
        pointer = os.path.join(self.scratch, "latest")
        try:
            self.store.download_object(f"{self.prefix}{LATEST}.symlink", pointer, overwrite=True)
        except FileNotFoundError:
            return None
        with open(pointer) as file:
            return file.read().rpartition("/")[2]

    def fetch(self, name: str, scratch: str) -> str:
        """Download a checkpoint unless that was done; return its local path."""
        path = os.path.join(scratch, name)
        if not os.path.exists(path):
            self.store.download_object(f"{self.prefix}{name}", path)
        return path

    def publish(
        self,
        unfinished: str,
        name: str,
        keep: int,
        best: str | None = None,
        own: Container[str] = (),
    ) -> None:
        """Upload a finished file in the background, then point at it and remove old ones of `own`.

        Raises:
            RunError: An earlier upload was given up, or another run has taken over the folder.
        """
        self.wait(0)
        self._count += 1  # one of the same batch may be on its way
        file = os.path.join(self.scratch, f"{self._count}-{name}")
        os.replace(unfinished, file)
        with self._lock:
            overtaken = [item for item in self._waiting if item.name != best or item.name == name]
            kept = [item for item in self._waiting if item not in overtaken]
            self._waiting = [*kept, Upload(file, name, keep, best, own)]
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, daemon=True).start()
        for item in overtaken:
            os.remove(item.file)

    def point_best(self, name: str | None) -> None:
        """Point `best-rank0.pt` at a checkpoint, or remove it."""
        key = f"{self.prefix}{BEST}.symlink"
        if name:
            self._point(BEST, name)
        elif key in self.store.list_objects(key):
            self._delete(f"{BEST}.symlink")

    def _point(self, pointer: str, name: str) -> None:
        path = os.path.join(self.scratch, pointer)
        with open(path, "w") as file:
            file.write(f"{self.prefix}{name}")
        self.store.upload_object(f"{self.prefix}{pointer}.symlink", path)

    def wait(self, seconds: float) -> bool:
        """Whether all that was published is there, after waiting for it.

        Raises:
            RunError: An upload was given up, or another run has taken over the folder.
        """
        if self._run_lock:
            self._run_lock.check()
        with self._lock:
            self._lock.wait_for(lambda: not self._busy, seconds)
            if self._failed:
                raise self._failed
            return not self._busy

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    self._lock.notify_all()
                    return
                item = self._waiting.pop(0)
            try:
                self._upload(item)
            except RunError as error:
                with self._lock:
                    self._failed, self._busy = error, False
                    self._lock.notify_all()
                return

    def _upload(self, item: Upload) -> None:
        name = item.name
        start, pause = time.monotonic(), 1.0
        while True:
            try:
                self.store.upload_object(f"{self.prefix}{name}", item.file)
                if item.best:
                    self._point(BEST, item.best)
                self._point(LATEST, name)
                os.remove(item.file)
                old = outdated(self.names(), name, item.keep, item.best, item.own)
                break
            except Exception as error:  # each store's client has its own
                message = f"cannot upload {self.path}/{name}: {one_line(error)}"
            if self._waiting and self._waiting[-1].best != name:
                log.warning("%s; the next checkpoint follows", message)
                os.remove(item.file)
                return
            if time.monotonic() - start > UPLOAD_FOR:
                kept = os.path.join(tempfile.mkdtemp(prefix="checkpoint-"), name)
                os.replace(item.file, kept)  # the scratch folder goes with this process
                raise RunError(f"{message}; given up; it is still at {kept}")
            log.warning("%s; trying again in %.0f s", message, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30)
        for name in old:
            self._delete(name)

    def _delete(self, name: str) -> None:
        """Delete an object. Failure, or a store without delete support, is only logged."""
        if not isinstance(self.store, S3ObjectStore):
            log.info("%s/%s stays: Composer cannot delete there", self.path, name)
            return
        try:
            key = self.store.get_key(f"{self.prefix}{name}")
            self.store.client.delete_object(Bucket=self.store.bucket, Key=key)
        except Exception as error:
            log.warning("cannot remove %s/%s: %s", self.path, name, one_line(error))


def outdated(
    names: list[str], newest: str, keep: int, best: str | None, own: Container[str]
) -> list[str]:
    """Return the checkpoints of a run to remove, so that its newest `keep` and its best are left.

    Args:
        names: All checkpoints of the folder, newest first.
        newest: The one that was just saved. Later ones stay: an earlier run or attempt left them.
        keep: How many to keep; -1: all.
        best: One more to keep.
        own: Those that this run may remove.
    """
    if keep < 0:
        return []
    older = [name for name in names if name in own and time_of(name) <= time_of(newest)]
    return [name for name in older[keep:] if name != best]


def _write_over(path: str, content: bytes) -> None:
    """Replace a small file in one rename."""
    unfinished = f"{path}.unfinished"
    Path(unfinished).write_bytes(content)
    os.replace(unfinished, path)


def open_folder(path: str) -> LocalFolder | RemoteFolder:
    """Open the folder or the object store that a config's `save_folder` names."""
    return RemoteFolder(path) if "://" in path else LocalFolder(path)


def is_in_folder(path: str, folder: str) -> bool:
    """Whether a path or URI names a file directly in a folder."""
    parent, folder = path.rpartition("/")[0] or ".", folder.rstrip("/")
    if "://" in path or "://" in folder:
        return parent == folder
    return os.path.realpath(parent) == os.path.realpath(folder)
