"""A reader with random access to MDS shards in a store, with a cache on the local disk."""

from __future__ import annotations

import contextlib
import filecmp
import functools
import logging
import os
import queue
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from streaming.base.hashing import get_hash
from streaming.base.storage.download import CloudDownloader
from streaming.base.stream import Stream
from streaming.base.util import bytes_to_int
from streaming.base.world import World

from dataset.downloads import is_final, with_retries
from errors import DataError, StoreError, one_line
from files import is_remote

log = logging.getLogger(__name__)

COLUMNS = ("uid", "x", "y")
# Name of the description file, which is stored next to the split folders.
DESCRIPTION = "description.yaml"
# Maximum number of samples that a valid shard can contain.
MAX_SAMPLES = 10**9
FILE_NAME = re.compile(r"[^/\0.][^/\0]{0,250}")


class Shards:
    """A reader with random access to the samples in the shards of one split.

    Streaming's own dataset has a fixed order that depends on the number of ranks. Therefore, this
    class uses only Streaming's downloads, decompression, hashes and shard format. The processes on
    a machine share the cache and coordinate through file locks, which the system releases when a
    process is killed.

    Args:
        remote: Folder or URL that contains the split's folder, in any store that Streaming
            supports. If `remote` is None, the shards are read from the folder `local`, which is not
            modified.
        local: Cache folder, or None to read the folder `remote` in place.
        split: Name of the split's folder.
        cache_limit: Maximum size of the cache in bytes, or as text such as '10gb'. The least
            recently used shards are deleted first. If `cache_limit` is None, the size is not
            limited.
        download_retry: Number of retries, after pauses of 1, 2, 4, ... seconds.
        download_timeout: Seconds to wait for a response from the store.
        validate_hash: Hash algorithm used to check each downloaded shard. With 'auto', a
            hash from the index is used if there is one. With None, shards are not checked.

    Raises:
        DataError: The index or a shard is missing or damaged.
    """

    def __init__(
        self,
        remote: str | None,
        local: str | None,
        split: str,
        cache_limit: int | str | None = None,
        download_retry: int = 6,
        download_timeout: float = 60,
        validate_hash: str | None = "auto",
    ):
        if local is None:
            if not remote or is_remote(remote):
                raise DataError(f"{remote}: remote shards need a cache; set local to a folder")
            remote, local = None, remote
        if remote and os.path.realpath(remote) == os.path.realpath(local):
            # `local` is the data set itself rather than a cache, so no shard may be downloaded or
            # deleted.
            remote = None
        self.is_cache = remote is not None
        self.location = os.path.join(remote or local, split)
        self.folder = os.path.join(local, split)
        self.retries = download_retry
        self.settings: dict[str, Any] = dict(
            remote=remote,
            local=local,
            split=split,
            # Streaming retries silently, even after permanent errors, so use `with_retries`
            # instead.
            download_retry=1,
            download_timeout=download_timeout,
            keep_zip=False,
        )
        self.streams: dict[tuple[int, int], Stream] = {}
        self.wanted: dict[int, queue.SimpleQueue[int]] = {}
        index = f"{self.location}/index.json"
        with self._alone_with_index():
            self._check_index()
            self.shards = with_retries(
                index, lambda: self.stream.get_shards(World.detect(), False), self.retries
            )
        if not self.shards:
            raise DataError(f"{index} lists no shards; convert the data set again")
        for shard in self.shards:
            if wrong := _implausible(shard):
                raise DataError(f"{index}: {wrong}")
            if not set(COLUMNS) <= set(shard.column_names):
                raise DataError(
                    f"{self.location}: the shards have the columns {shard.column_names} instead of "
                    f"{COLUMNS}; convert the data set again"
                )
            # Read images and masks as encoded bytes. Otherwise, Streaming would decode them with
            # Pillow.
            shard.column_encodings = [
                "bytes" if name in ("x", "y") else encoding
                for name, encoding in zip(shard.column_names, shard.column_encodings)
            ]
        if validate_hash == "auto":
            info = self.shards[0].zip_data or self.shards[0].raw_data
            # Use the hash whose name sorts last. This prefers xxh64, which is faster than sha1.
            validate_hash = max(info.hashes, default=None)
        self.validate_hash = validate_hash
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.cache_limit = self._check_limit(cache_limit) if self.is_cache else None

    def _alone_with_index(self) -> contextlib.AbstractContextManager:
        """Return a lock on the cache's index. Only the first rank of each node needs the lock."""
        if not self.is_cache or not World.detect().is_local_leader:
            return contextlib.nullcontext()
        os.makedirs(self.folder, exist_ok=True)
        return FileLock(os.path.join(self.folder, "index.json.lock"))

    def _check_index(self) -> None:
        """Raise DataError if the cache contains an earlier version of the data set."""
        path = os.path.join(self.folder, "index.json")
        if not self.is_cache or not os.path.exists(path) or not World.detect().is_local_leader:
            return
        # Other processes may run this check at the same time, so each process uses its own folder.
        with tempfile.TemporaryDirectory() as folder:
            fresh = os.path.join(folder, "index.json")
            try:
                CloudDownloader.direct_download(f"{self.location}/index.json", fresh)
            except Exception as error:
                level = logging.INFO if is_final(error) else logging.WARNING
                log.log(level, "%s: %s; continuing with the cache", self.location, one_line(error))
                return
            is_same = filecmp.cmp(path, fresh, shallow=False)
        if not is_same:
            raise DataError(
                f"{self.folder} contains an earlier version of {self.location}; delete this folder"
            )

    def _check_limit(self, cache_limit: int | str | None) -> int | None:
        if cache_limit is None:
            return None
        limit = bytes_to_int(cache_limit)
        largest = max(shard.get_max_size() for shard in self.shards)
        if limit < 4 * largest:
            raise DataError(
                f"cache_limit {cache_limit} is too small for {self.location}; use at least "
                f"{4 * largest} bytes, which is four times the size of the largest shard"
            )
        return limit

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "streams": {}, "wanted": {}}

    def shard_of(self, index: int | np.ndarray) -> int | np.ndarray:
        """Return the number of the shard that contains a sample.

        Args:
            index: Index of the sample, or an array of indices.
        """
        return np.searchsorted(self.ends, index, side="right")

    @property
    def shards_at_once(self) -> int | None:
        """Number of shards to read from at the same time, or None if all shards fit in the cache.

        These shards fill half of the cache; the other half is for the shards that are downloaded
        next.
        """
        sizes = [shard.get_max_size() for shard in self.shards]
        if self.cache_limit is None or sum(sizes) <= self.cache_limit:
            return None
        return self.cache_limit // max(sizes) // 2

    def read(self, index: int) -> tuple[str, bytes, bytes, tuple[str, str]]:
        """Return a sample's uid, its encoded image and mask, and their names for error messages.

        Args:
            index: Index of the sample.

        Raises:
            DataError: The shard is missing or damaged.
            StoreError: The store does not respond.
        """
        shard = int(self.shard_of(index))
        reader, path = self.shards[shard], self.path(shard)
        row = index - int(self.ends[shard]) + len(reader)
        for _ in range(10):
            try:
                sample = reader[row]
                break
            # Either the shard is not downloaded yet, or another process has deleted it to free
            # space.
            except FileNotFoundError:
                self.fetch(shard)
            except Exception as error:
                again = "; delete it to download it again" if self.is_cache else ""
                raise DataError(f"{path} is damaged: {one_line(error)}{again}") from error
        else:
            raise DataError(f"{path} was deleted before it could be read; increase cache_limit")
        if self.cache_limit:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)
        uid = sample["uid"]
        uid = uid.decode("utf-8", "surrogateescape") if isinstance(uid, bytes) else str(uid)
        # Remove ADE20K's prefix from the uid, so that it is the same as for a data set in folders.
        uid = uid.removeprefix(f"ADE_{self.settings['split']}_")
        name = f"{self.location}/{reader.raw_data.basename}, sample {uid}"
        return uid, sample["x"], sample["y"], (f"{name}, image", f"{name}, mask")

    def prefetch(self, index: int) -> None:
        """Download the shard that contains a sample, in the background.

        Args:
            index: Index of the sample.
        """
        shard = int(self.shard_of(index))
        if os.path.exists(self.path(shard)):
            return
        # A forked process inherits its parent's queue but not the thread that reads it, so each
        # process needs its own queue and thread.
        if os.getpid() not in self.wanted:
            self.wanted = {os.getpid(): queue.SimpleQueue()}
            threading.Thread(target=self._fetch_wanted, daemon=True).start()
        self.wanted[os.getpid()].put(shard)

    def _fetch_wanted(self) -> None:
        while True:
            shard = self.wanted[os.getpid()].get()
            try:
                self.fetch(shard, wait=False)
            except DataError as error:  # The error is raised again when the shard is read.
                log.debug("%s", error)

    def path(self, shard: int) -> str:
        """Return a shard's local path; the file exists only after the shard is downloaded.

        Args:
            shard: Number of the shard.
        """
        return os.path.join(self.folder, self.shards[shard].raw_data.basename)

    @property
    def stream(self) -> Stream:
        """The downloader for the current thread.

        Each thread and each process needs its own downloader, because a downloader's connections
        cannot be shared.
        """
        key = (os.getpid(), threading.get_ident())
        if key not in self.streams:
            self.streams[key] = Stream(**self.settings)
        return self.streams[key]

    def fetch(self, shard: int, wait: bool = True) -> None:
        """Download a shard, unless another process has already downloaded it.

        Args:
            shard: Number of the shard.
            wait: Whether to wait while another process downloads the shard.

        Raises:
            DataError: The shard is missing or damaged.
            StoreError: The store does not respond.
        """
        path, reader = self.path(shard), self.shards[shard]
        if os.path.exists(path):
            return
        # If the cache size is limited, download one shard at a time, because parallel downloads
        # could exceed the limit.
        lock = "cache" if self.cache_limit else os.path.basename(path)
        os.makedirs(self.folder, exist_ok=True)
        try:
            held = FileLock(os.path.join(self.folder, f"{lock}.lock")).acquire(blocking=wait)
        except TimeoutError:
            return
        with held:
            if os.path.exists(path):
                return
            if self.cache_limit:
                self._make_room(reader.get_max_size())
            name = (reader.zip_data or reader.raw_data).basename
            prepare = functools.partial(self._prepare, reader, name)
            with_retries(f"{self.location}/{name}", prepare, self.retries, StoreError)

    def _prepare(self, reader: Any, name: str) -> None:
        """Download, check and decompress a shard."""
        stream = self.stream
        stream.validate_hash = self.validate_hash
        try:
            stream.prepare_shard(reader)
        except Exception as error:
            if not os.path.exists(os.path.join(self.folder, name)):
                raise
            if self.is_cache:
                reader.evict()
            raise DataError(f"is damaged: {one_line(error)}") from error

    def _make_room(self, size: int) -> None:
        assert self.cache_limit is not None
        present = [shard for shard in range(len(self.shards)) if os.path.exists(self.path(shard))]
        present.sort(key=lambda shard: os.path.getmtime(self.path(shard)), reverse=True)
        used = sum(self.shards[shard].get_raw_size() for shard in present)
        while present and used + size > self.cache_limit:
            used -= self.shards[present.pop()].evict()


def _implausible(shard: Any) -> str | None:
    """Return the reason why a shard's index entry is invalid, or None if it is valid.

    In a valid entry, all file names stay inside the folder and all numbers are within their limits.
    """
    if type(shard.samples) is not int or not 0 <= shard.samples <= MAX_SAMPLES:
        return f"samples: got {shard.samples!r}; expected 0 to {MAX_SAMPLES}"
    columns = shard.column_names, shard.column_encodings, shard.column_sizes
    if not all(isinstance(part, list) and len(part) == len(columns[0]) for part in columns):
        return "column_names, column_encodings and column_sizes must be lists of equal length"
    if not shard.raw_data:
        return "raw_data is missing"
    for info in filter(None, (shard.raw_data, shard.zip_data)):
        name, size = info.basename, info.bytes
        if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
            return f"basename: got {name!r}; expected a file name without a folder"
        if type(size) is not int or size < 0:
            return f"bytes: got {size!r}; expected the size of {name}"
    return None


def open_shards(path: str, local: str | None, split: str) -> Shards:
    """Open a split of MDS shards as training does, but with fewer retries.

    Args:
        path: Folder or URL of the shards.
        local: Cache folder, or None to read the folder `path` in place.
        split: Name of the split's folder.
    """
    return Shards(path, local, split, download_retry=2)


# Keep splits open, because a worker process reads several shards of the same split.
cached_shards = functools.lru_cache(maxsize=2)(open_shards)


def read_shard(shards: Shards, number: int) -> Iterator[tuple[str, bytes, bytes]]:
    """Yield the uid, the encoded image and the encoded mask of each sample in a shard.

    The hash is checked even if the shard is already in the cache. Training checks hashes only after
    downloads.

    Args:
        shards: The shards of a split.
        number: Number of the shard.

    Raises:
        DataError: The shard is missing or damaged.
    """
    shards.fetch(number)
    path, shard = shards.path(number), shards.shards[number]
    content = Path(path).read_bytes()
    damaged = f"{path} is damaged"
    remedy = "delete it to download it again" if shards.is_cache else "convert the data set again"
    if len(content) != (size := shard.raw_data.bytes):
        raise DataError(f"{damaged}: it has {len(content):,} bytes instead of {size:,}; {remedy}")
    for algorithm, expected in sorted(shard.raw_data.hashes.items())[-1:]:
        if get_hash(algorithm, content) != expected:
            raise DataError(f"{damaged}: its {algorithm} hash does not match the index; {remedy}")
    end = int(shards.ends[number])
    yield from (shards.read(index)[:3] for index in range(end - len(shard), end))
