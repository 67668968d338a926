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
import os
import re
import tempfile
from collections.abc import Container, Iterable
from contextlib import suppress
from pathlib import Path

from checkpointing.lock import NAME as LOCK
from checkpointing.lock import FileLock, RecordLock, describe_self
from errors import WeightsError
from files import is_remote, write_file

LATEST, BEST = "latest-rank0.pt", "best-rank0.pt"
NAME = re.compile(r"ep(\d+)-ba(\d+)-rank0\.pt")
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


def newest_first(names: Iterable[str]) -> list[str]:
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

            self._run_lock = RecordLock(self.path, owner, read, lambda text: write_file(path, text))

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
        return newest_first(os.listdir(self.path) if os.path.isdir(self.path) else [])

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
            write_file(f"{path}.symlink", name)
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


def is_in_folder(path: str, folder: str) -> bool:
    """Whether a path or URI names a file directly in a folder."""
    parent, folder = path.rpartition("/")[0] or ".", folder.rstrip("/")
    if is_remote(path) or is_remote(folder):
        return parent == folder
    return os.path.realpath(parent) == os.path.realpath(folder)
