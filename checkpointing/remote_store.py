"""A store for checkpoints on S3 and similar services; see `checkpointing.stores`."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import cast

from composer.utils import maybe_create_object_store_from_uri, parse_uri
from composer.utils.object_store import ObjectStore, S3ObjectStore

from checkpointing.lock import NAME as LOCK
from checkpointing.lock import RecordLock, describe_self
from checkpointing.stores import BEST, LATEST, NewCheckpoint, newest_first, outdated
from errors import RunError, one_line

log = logging.getLogger(__name__)

UPLOAD_FOR = 3600.0  # Seconds to keep retrying an upload before giving up.


class RemoteFolder:
    """Checkpoints in an object store, uploaded in the background during training.

    If an upload fails, it is retried for an hour. If a newer checkpoint is saved while an older one
    is still waiting or being retried, the older one is dropped, unless it is the best. At most
    three checkpoints therefore wait on the local disk.

    Args:
        uri: URI of the folder, such as s3://bucket/folder.
    """

    def __init__(self, uri: str):
        backend, bucket, folder = parse_uri(uri)
        self.path, self.prefix = uri.rstrip("/"), f"{folder.strip('/')}/".lstrip("/")
        # With botocore's default timeouts, a run would take five minutes to notice that S3 is not
        # responding.
        if backend == "s3":
            config = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 3}}
            self.store: ObjectStore = S3ObjectStore(bucket, client_config=config)
        else:
            self.store = cast(ObjectStore, maybe_create_object_store_from_uri(uri))
        self._folder = tempfile.TemporaryDirectory(prefix="checkpoints-")
        self.scratch = self._folder.name
        self._run_lock: RecordLock | None = None
        self._lock = threading.Condition()
        self._waiting: list[NewCheckpoint] = []
        self._count = 0
        self._busy = False
        self._failed: RunError | None = None

    def lock(self, run_name: str | None) -> None:
        """Lock the folder for this process until the process ends or calls `release_locks`.

        Raises:
            ConfigError: Another active run writes to the folder.
            Exception: The store's client raised an error.
        """
        owner = describe_self(run_name)
        self._run_lock = RecordLock(
            self.path, owner, lambda: self._read(LOCK), lambda text: self._write(LOCK, text)
        )

    def remove_unfinished(self) -> None:
        """Do nothing, because an object store never contains incomplete objects."""

    def probe(self) -> None:
        """Write and delete a small object; raise the client's error if that fails."""
        self._write(".probe", b"")
        self._delete(".probe")

    def names(self) -> list[str]:
        """Return the checkpoints, newest first."""
        names = (key.partition(self.prefix)[2] for key in self.store.list_objects(self.prefix))
        return newest_first(names)

    def latest(self) -> str | None:
        """Return the name of the checkpoint that was published last, or None."""
        pointer = self._read(f"{LATEST}.symlink")
        return None if pointer is None else pointer.decode().rpartition("/")[2]

    def fetch(self, name: str, scratch: str) -> str:
        """Download a checkpoint unless a local copy exists; return its local path."""
        path = os.path.join(scratch, name)
        if not os.path.exists(path):
            self.store.download_object(f"{self.prefix}{name}", path)
        return path

    def publish(self, new: NewCheckpoint) -> None:
        """Upload a file in the background, then update the pointers and remove old checkpoints.

        Raises:
            RunError: An earlier upload failed permanently, or another run has taken over the
                folder.
        """
        self.wait(0)
        # A checkpoint with the same name may still be uploading, so make the file name unique.
        self._count += 1
        file = os.path.join(self.scratch, f"{self._count}-{new.name}")
        os.replace(new.file, file)
        with self._lock:
            # The new checkpoint replaces all waiting checkpoints except the best one. It replaces
            # the best one only if both have the same name.
            kept = [i for i in self._waiting if i.name == new.best and i.name != new.name]
            overtaken = [item for item in self._waiting if item not in kept]
            self._waiting = [*kept, new._replace(file=file)]
            if not self._busy:
                self._busy = True
                threading.Thread(target=self._work, daemon=True).start()
        for item in overtaken:
            os.remove(item.file)

    def point_best(self, name: str | None) -> None:
        """Point `best-rank0.pt` at a checkpoint, or remove the pointer."""
        key = f"{self.prefix}{BEST}.symlink"
        if name:
            self._point(BEST, name)
        elif key in self.store.list_objects(key):
            self._delete(f"{BEST}.symlink")

    def _point(self, pointer: str, name: str) -> None:
        self._write(f"{pointer}.symlink", f"{self.prefix}{name}".encode())

    def _read(self, name: str) -> bytes | None:
        """Return the content of a small object, or None if it does not exist."""
        path = Path(self.scratch, f"read-{name}")
        try:
            self.store.download_object(f"{self.prefix}{name}", path, overwrite=True)
        except FileNotFoundError:
            return None
        return path.read_bytes()

    def _write(self, name: str, content: bytes) -> None:
        path = Path(self.scratch, f"write-{name}")
        path.write_bytes(content)
        self.store.upload_object(f"{self.prefix}{name}", path)

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds` for pending uploads, and return whether all are done.

        Raises:
            RunError: An upload failed permanently, or another run has taken over the folder.
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

    def _upload(self, item: NewCheckpoint) -> None:
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
            # Clients of object stores raise many types of exceptions, so retry after any of them.
            except Exception as error:
                message = f"cannot upload {self.path}/{name}: {one_line(error)}"
            if self._waiting and self._waiting[-1].best != name:
                log.warning("%s; skipped, because a newer checkpoint is waiting", message)
                os.remove(item.file)
                return
            if time.monotonic() - start > UPLOAD_FOR:
                kept = os.path.join(tempfile.mkdtemp(prefix="checkpoint-"), name)
                # Move the checkpoint out of the scratch folder, which is deleted when the process
                # ends.
                os.replace(item.file, kept)
                raise RunError(
                    f"{message}; gave up after {UPLOAD_FOR / 60:.0f} minutes, but the checkpoint "
                    f"is still at {kept}"
                )
            log.warning("%s; trying again in %.0f s", message, pause)
            time.sleep(pause)
            pause = min(2 * pause, 30)
        self.remove(old)

    def remove(self, names: Iterable[str]) -> None:
        """Remove checkpoints; log an error if that fails."""
        for name in names:
            self._delete(name)

    def _delete(self, name: str) -> None:
        """Delete an object; log an error if that fails or the store does not support deletion."""
        if not isinstance(self.store, S3ObjectStore):
            log.info(
                "%s/%s is kept, because Composer cannot delete objects from this store",
                self.path,
                name,
            )
            return
        try:
            key = self.store.get_key(f"{self.prefix}{name}")
            self.store.client.delete_object(Bucket=self.store.bucket, Key=key)
        except Exception as error:
            log.warning("cannot remove %s/%s: %s", self.path, name, one_line(error))
