"""Checkpoint stores that never contain a partial checkpoint.

A checkpoint gets its final name only when it is completely on the disk or in the object store.
After that, `best-rank0.pt` and `latest-rank0.pt` are updated. Old checkpoints are removed last.

Composer's own saver has five problems:

- It overwrites existing files in place.
- It removes the old `latest-rank0.pt` before it creates the new link.
- It forgets old checkpoints when a run resumes.
- It never removes checkpoints from an object store.
- It gives up if a store is down for a few seconds.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import tempfile
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from checkpointing.lock import NAME as LOCK
from checkpointing.lock import FileLock, RecordLock, describe_self
from errors import WeightsError
from files import is_remote, write_file

LATEST, BEST = "latest-rank0.pt", "best-rank0.pt"
NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
# Error codes of file systems without symbolic links, such as exFAT or a mounted bucket.
NO_SYMLINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class NewCheckpoint(NamedTuple):
    """A checkpoint that has been written to a temporary file and is ready to be published.

    Args:
        file: Temporary path of the finished file. Publishing the checkpoint moves this file.
        name: Name of the checkpoint.
        keep: Number of newest checkpoints to keep; -1 keeps all.
        best: Name of the best checkpoint, which is also kept, or None.
        own: Names of the checkpoints that may be removed.
    """

    file: str
    name: str
    keep: int
    best: str | None = None
    own: Container[str] = ()


def batch_of(name: str) -> int:
    """Return the batch number in a checkpoint's name, or -1 for any other name."""
    return time_of(name)[0]


def time_of(name: str) -> tuple[int, int]:
    """Return the batch and epoch numbers in a checkpoint's name, each -1 for any other name.

    The last batch of an epoch may have two checkpoints. The second checkpoint is saved after the
    evaluation at the end of the epoch.
    """
    match = NAME.fullmatch(name)
    return (int(match[2]), int(match[1])) if match else (-1, -1)


def newest_first(names: Iterable[str]) -> list[str]:
    """Return only the names of checkpoints, newest first."""
    return sorted((name for name in names if NAME.fullmatch(name)), key=time_of, reverse=True)


def checkpoint_in(path: str | os.PathLike[str]) -> str:
    """Return the path of a checkpoint's file.

    Args:
        path: Path of the checkpoint file, a pointer to it, a run's folder, or a folder written by
            `save_pretrained`. In a run's folder, the best checkpoint is used if there is one, and
            otherwise the newest.

    Raises:
        WeightsError: The folder contains no checkpoint.
    """
    if not os.path.isdir(path):
        folder, name = os.path.split(path)
        pointed = None if os.path.exists(path) else LocalFolder(folder or ".").pointed(name)
        return os.path.join(folder, pointed) if pointed else os.fspath(path)
    folder = LocalFolder(os.fspath(path))
    newest = folder.names()[:1]
    # Names of the weights files that save_pretrained and `export.py --to hub` write.
    saved = ("model.safetensors", "pytorch_model.bin")
    for name in (BEST, folder.pointed(BEST), LATEST, folder.pointed(LATEST), *newest, *saved):
        if name and os.path.exists(found := os.path.join(path, name)):
            return found
    raise WeightsError(
        f"{path}: the folder contains no checkpoint; give a checkpoint file or a run's save_folder"
    )


class LocalFolder:
    """Checkpoints in a folder on this machine or on a shared file system.

    Args:
        path: Path of the folder.
    """

    def __init__(self, path: str):
        self.path = self.scratch = path
        self._run_lock: FileLock | RecordLock | None = None

    def lock(self, run_name: str | None) -> None:
        """Lock the folder for this process until the process ends or calls `release_locks`.

        Raises:
            ConfigError: Another active run writes to the folder.
            OSError: The folder is not writable.
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

            self._run_lock = RecordLock(self.path, owner, read, lambda text: write_file(path, text))

    def probe(self) -> None:
        """Try a save's file operations with small files; raise an OSError if one of them fails."""
        with tempfile.NamedTemporaryFile(dir=self.path, prefix=".probe-") as file:
            file.write(b"probe")
            file.flush()
        for name in ("first", "second"):
            self._point(".probe", name)
        self._unpoint(".probe")
        self._sync()

    def remove_unfinished(self) -> None:
        """Remove the incomplete files that a killed run left behind."""
        for path in glob.glob(os.path.join(glob.escape(self.path), "ep*-rank0.pt.unfinished")):
            os.remove(path)

    def names(self) -> list[str]:
        """Return the checkpoints, newest first."""
        return newest_first(os.listdir(self.path) if os.path.isdir(self.path) else [])

    def latest(self) -> str | None:
        """Return the name of the checkpoint that was published last, or None."""
        return self.pointed(LATEST)

    def pointed(self, pointer: str) -> str | None:
        """Return the name of the checkpoint that a link or pointer file points to, or None."""
        path = os.path.join(self.path, pointer)
        with suppress(OSError):
            return os.path.basename(os.readlink(path))
        with suppress(OSError, UnicodeDecodeError):
            return os.path.basename(Path(f"{path}.symlink").read_text().strip())
        return None

    def fetch(self, name: str, scratch: str) -> str:
        """Return the local path of a checkpoint.

        Raises:
            FileNotFoundError: The file does not exist on this machine.
        """
        path = os.path.join(self.path, name)
        os.stat(path)
        return path

    def publish(self, new: NewCheckpoint) -> None:
        """Give a finished file its final name, point `latest` to it, and remove old checkpoints.

        Each step is a single rename, so `latest` always points to a complete checkpoint, even if
        the machine fails.

        Raises:
            RunError: Another run has taken over the folder.
        """
        if self._run_lock:
            self._run_lock.check()
        os.replace(new.file, os.path.join(self.path, new.name))
        self._sync()
        if new.best:
            self.point_best(new.best)
        self._point(LATEST, new.name)
        self._sync()
        self.remove(outdated(self.names(), new.name, new.keep, new.best, new.own))

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints."""
        for name in names:
            os.remove(os.path.join(self.path, name))

    def point_best(self, name: str | None) -> None:
        """Point `best-rank0.pt` at a checkpoint, or remove the pointer."""
        if name:
            self._point(BEST, name)
        else:
            self._unpoint(BEST)

    def _point(self, pointer: str, name: str) -> None:
        """Create a link, or a pointer file if the file system has no symbolic links."""
        path = os.path.join(self.path, pointer)
        link = f"{path}.unfinished"
        with suppress(FileNotFoundError):
            os.remove(link)
        try:
            os.symlink(name, link)
        except OSError as error:
            if error.errno not in NO_SYMLINKS:
                raise
            write_file(f"{path}.symlink", name)
        else:
            os.replace(link, path)

    def _unpoint(self, pointer: str) -> None:
        for name in (pointer, f"{pointer}.symlink"):
            Path(self.path, name).unlink(missing_ok=True)

    def _sync(self) -> None:
        """Flush the folder's entries to the disk."""
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:  # Some file systems can sync files, but not folders.
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        finally:
            os.close(folder)

    def wait(self, seconds: float) -> bool:
        """Return True, because a local folder has no pending uploads."""
        return True


def outdated(
    names: list[str], newest: str, keep: int, best: str | None, own: Container[str]
) -> list[str]:
    """Return the checkpoints to remove: all except the newest `keep` and the best.

    Args:
        names: All checkpoints in the folder, newest first.
        newest: Name of the checkpoint that was just saved. Checkpoints with a later time are kept,
            because they belong to another run or an earlier attempt.
        keep: Number of newest checkpoints to keep; -1 keeps all.
        best: Best checkpoint, which is also kept, or None.
        own: Names of the checkpoints that this run may remove.
    """
    if keep < 0:
        return []
    older = [name for name in names if name in own and time_of(name) <= time_of(newest)]
    return [name for name in older[keep:] if name != best]


def is_in_folder(path: str, folder: str) -> bool:
    """Return whether a path or URI refers to a file directly inside a folder."""
    parent, folder = path.rpartition("/")[0] or ".", folder.rstrip("/")
    if is_remote(path) or is_remote(folder):
        return parent == folder
    return os.path.realpath(parent) == os.path.realpath(folder)
