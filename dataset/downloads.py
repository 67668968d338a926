"""Functions that download files from a shard store, with retries."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from typing import Any

from streaming.base.storage.download import CloudDownloader

from errors import DataError, StoreError, one_line

log = logging.getLogger(__name__)

_NOT_THERE = {"403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket", "InvalidAccessKeyId"}


def with_retries(
    name: str, action: Callable[[], Any], retries: int, away: type[DataError] = DataError
) -> Any:
    """Call a download function, and retry it after temporary errors.

    Args:
        name: Name of the download, for error messages.
        action: Function that performs the download.
        retries: Number of retries, after pauses of 1, 2, 4, ... seconds.
        away: Exception class to raise if temporary errors persist after all retries. For a
            permanent error, DataError is raised.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except Exception as error:
            if is_final(error) or attempt == retries:
                kind = DataError if is_final(error) else away
                raise kind(f"{name}: {one_line(error)}") from error
            delay = 2**attempt
            log.warning("%s: %s; trying again in %d s", name, one_line(error), delay)
            time.sleep(delay)


def is_final(error: Exception) -> bool:
    """Return whether an error is permanent, that is, whether a retry would fail again."""
    is_local = isinstance(error, (FileNotFoundError, PermissionError, ValueError, RuntimeError))
    return is_local or _code(error) in _NOT_THERE or type(error).__name__ == "NoCredentialsError"


def _code(error: Exception) -> str | None:
    """Return the error code of an S3 client error, or None for any other error."""
    return (getattr(error, "response", None) or {}).get("Error", {}).get("Code")


def is_missing(error: Exception) -> bool:
    """Return whether a download error means that the file does not exist.

    The result is False if the error is ambiguous.

    Args:
        error: Exception raised by a download.
    """
    code = _code(error)
    # S3 also returns 403 for files that the credentials cannot access, so 403 does not prove that a
    # file is missing.
    if code is not None:
        return code in ("404", "NoSuchKey", "NoSuchBucket")
    # Other stores have their own exception types, so also search the error message.
    words = r"not found|no such (file|key|object|bucket)|does not exist|\b404\b"
    return isinstance(error, FileNotFoundError) or bool(re.search(words, str(error), re.I))


def fetch_beside(path: str, name: str, folder: str, retries: int = 2) -> str | None:
    """Return the local path of a file stored next to the split folders of the shards.

    A remote file is downloaded to `folder` first.

    Args:
        path: Folder or URL of the shards.
        name: Name of the file.
        folder: Folder to download the file to.
        retries: Number of retries, after pauses of 1, 2, 4, ... seconds.

    Returns:
        The path on this machine, or None if the file does not exist.

    Raises:
        DataError: The store does not answer, so it is unknown whether the file exists.
    """
    if "://" not in path:
        return os.path.join(path, name) if os.path.isfile(os.path.join(path, name)) else None
    remote, copy = f"{path.rstrip('/')}/{name}", os.path.join(folder, name)

    def download() -> str | None:
        try:
            CloudDownloader.direct_download(remote, copy)
        except Exception as error:
            if is_missing(error):
                return None
            raise
        return copy

    return with_retries(remote, download, retries, StoreError)
