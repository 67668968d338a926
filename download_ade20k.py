"""Download ADE20K (SceneParsing benchmark, ADEChallengeData2016, 0.9 GB) and unpack it.

    python download_ade20k.py                    # into ./ade20k; train with path=./ade20k
    python download_ade20k.py --path /data/ade20k
    python download_ade20k.py --url http://mirror/ADEChallengeData2016.zip

You may interrupt it at any time; run it again to continue. The archive is checked against its SHA-1
before anything is unpacked, and the unpacked folder appears all at once. If the folder already
exists and is complete, nothing happens. The download is `<path>/ADEChallengeData2016.zip.part`
until it is unpacked. A complete or partial archive that you put at
`<path>/ADEChallengeData2016.zip` is used and kept. Exit status: 0 complete, 1 failed, 130
interrupted.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import requests
import urllib3
from tqdm import tqdm

log = logging.getLogger(__name__)

URL = "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
SHA1 = "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7"
FOLDER = "ADEChallengeData2016"
# Files in the official archive. They tell whether a folder that was unpacked by other means is
# complete.
OFFICIAL_COUNTS = {
    "images/training": 20_210,
    "images/validation": 2_000,
    "annotations/training": 20_210,
    "annotations/validation": 2_000,
}
# extract() writes this file last: the archive's SHA-1 and its number of files.
MARKER = ".complete.json"

# Attempts in a row without progress. With pauses of 1, 2, 4, ... s, they take half a minute.
ATTEMPTS = 6
TIMEOUT = 60  # Timeout in seconds without a byte from the server.
CHUNK = 1 << 20
# JPEG and PNG do not compress, so the files need about the size of the archive, plus rounding up to
# blocks.
UNPACKED_SIZE = 1.2
BLOCK = 4096


class DownloadError(RuntimeError):
    """An error that prevents the download; the message is one line that says what to do."""


class _ConnectionLost(Exception):
    """A failure of the server or the connection that may pass, so that a retry is worthwhile."""


def download_ade20k(path: str | Path, url: str = URL, sha1: str = SHA1) -> Path:
    """Download and unpack the data set to `<path>/ADEChallengeData2016`, if it is not complete.

    Args:
        path: Folder that will contain `ADEChallengeData2016`; the `path` for training.
        url: Address of the archive, http or https. A mirror must hold the same bytes.
        sha1: SHA-1 of the archive, 40 hex digits.

    Returns:
        `<path>/ADEChallengeData2016`.

    Raises:
        DownloadError: The server, the archive or the disk fails, or an incomplete folder exists.
    """
    if not re.match("https?://", url):
        raise DownloadError(f"{url}: the address must begin with http:// or https://")
    path = Path(path).expanduser()
    folder, archive = path / FOLDER, path / f"{FOLDER}.zip"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _only_one(path):
            if folder.exists():
                if problem := _what_is_missing(folder, sha1):
                    raise DownloadError(
                        f"{folder} exists, but {problem}; move it away and run the command "
                        "again, or use another --path"
                    )
                log.info("%s is complete; nothing to do", folder)
            else:
                fetched = fetch(url, archive, sha1)
                extract(fetched, folder, sha1)
                if fetched != archive:
                    fetched.unlink()
                log.info("%s is complete; train with path=%s", folder, path)
    except OSError as error:  # The disk may be full, or the folder may not be writable.
        raise DownloadError(
            f"{error.filename or path}: {error.strerror or error}; fix this and run the "
            "command again; the downloaded part is kept"
        ) from error
    return folder


def fetch(url: str, archive: Path, sha1: str) -> Path:
    """Download `url` to `archive` with the suffix `.part`; continue an earlier download.

    Args:
        url: Address of the archive.
        archive: Path of the archive.
        sha1: SHA-1 of the archive.

    Returns:
        The downloaded file, or `archive` if the user put the complete archive there.

    Raises:
        DownloadError: The server or the disk fails, or the archive has another SHA-1.
    """
    part = archive.with_name(f"{archive.name}.part")
    if _size(archive) > 0:
        if _sha1(archive) == sha1:
            return archive
        if not part.exists():  # Do not change the user's file.
            with _naming(part):
                shutil.copyfile(archive, part)
    resumed = _size(part) > 0
    if resumed and _sha1(part) == sha1:
        return part
    _download(url, part)
    found = _sha1(part)
    if found != sha1 and resumed:
        # The first part may belong to another version of the file, or to another file.
        log.warning("the continued archive has SHA-1 %s; downloading it from the start", found)
        part.unlink()
        _download(url, part)
        found = _sha1(part)
    if found != sha1:
        part.unlink()
        raise DownloadError(
            f"{url} has SHA-1 {found} instead of {sha1}, so it is not the ADE20K archive; "
            "it was deleted; try again, or give another --url"
        )
    return part


def _download(url: str, archive: Path) -> None:
    """Repeat `_download_rest` until the file is complete, as long as attempts bring new bytes."""
    failures, most = 0, _size(archive)
    while True:
        try:
            _download_rest(url, archive)
            return
        except (_ConnectionLost, requests.RequestException, urllib3.exceptions.HTTPError) as error:
            size = _size(archive)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures == ATTEMPTS:
                raise DownloadError(
                    f"{url}: {error}; gave up after {ATTEMPTS} attempts in a row without "
                    f"progress ({_bytes(size)} kept in {archive}); run the command again to "
                    "continue"
                ) from error
            wait = 2 ** (failures - 1)
            log.warning("%s: %s; trying again in %d s", url, error, wait)
            time.sleep(wait)


def _download_rest(url: str, archive: Path) -> None:
    """Request the missing bytes, and append them to the file.

    Raises:
        DownloadError: The server refuses, or the disk is too small.
        _ConnectionLost, requests.RequestException, urllib3.exceptions.HTTPError: The connection
            failed; another attempt may continue.
    """
    have = _size(archive)
    headers = {"User-Agent": "ade20k-download/1.0", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if status == 416 and have:  # The server has nothing after our bytes.
            if content_range == f"bytes */{have}":
                return
            archive.unlink()
            raise _ConnectionLost("the part downloaded earlier does not match; starting over")
        if status in (408, 425, 429) or status >= 500:
            raise _ConnectionLost(f"HTTP {status} {response.reason}")
        if not response.ok:
            raise DownloadError(f"{url}: HTTP {status} {response.reason}; check the address")
        is_rest = status == 206 and content_range.startswith(f"bytes {have}-")
        start = have if is_rest else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        if total:
            needed = total - have + UNPACKED_SIZE * total
            _require_space(archive.parent, int(needed), "the archive and its files")
        bar = tqdm(
            total=total, initial=start, unit="B", unit_scale=True, desc="download", disable=None
        )
        with bar, _naming(archive), open(archive, "ab" if is_rest else "wb") as file:
            # Unlike iter_content, read1 loses no bytes when the connection breaks.
            while chunk := response.raw.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def extract(archive: Path, folder: Path, sha1: str) -> None:
    """Unpack the archive's `ADEChallengeData2016/` so that `folder` appears all at once.

    Args:
        archive: Path of the archive.
        folder: Folder to create.
        sha1: SHA-1 of the archive, which is recorded in the folder.

    Raises:
        DownloadError: The archive is damaged or hostile, or the disk is too small. `folder` is not
            created.
    """
    temporary = folder.with_name(f".{FOLDER}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # A killed run may have left this folder.
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _safe_members(zipped)
            size = sum(BLOCK * (member.file_size // BLOCK + 1) for member in members)
            _require_space(folder.parent, size, f"the {len(members):,} files in {archive.name}")
            for member in tqdm(members, unit=" files", desc="unpack", disable=None):
                target = temporary / member.filename
                target.parent.mkdir(parents=True, exist_ok=True)
                # Reading stops at the size in the archive's directory, and checks the CRC there.
                final = folder.parent / member.filename
                with zipped.open(member) as source, _naming(final), open(target, "xb") as out:
                    shutil.copyfileobj(source, out, CHUNK)
        marker = {"sha1": sha1, "files": len(members)}
        (temporary / FOLDER / MARKER).write_text(json.dumps(marker) + "\n")
        os.rename(temporary / FOLDER, folder)
    except DownloadError:
        raise
    # zipfile raises many errors, even OSError if it reads a wrong position from a damaged file.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # The disk failed.
        raise DownloadError(
            f"{archive} cannot be unpacked ({error}); delete it and run the command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _safe_members(zipped: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the regular files under the folder; refuse a hostile archive."""
    members, seen = [], set()
    for member in zipped.infolist():
        name, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        problem = None
        if name.is_absolute() or ".." in name.parts or re.search(r"[\\\0]|^\w:", member.filename):
            problem = "leads outside the target folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device, not a file"
        elif member.flag_bits & 1:
            problem = "is encrypted"
        elif name in seen:
            problem = "is in it twice"
        if problem:
            raise DownloadError(
                f"{zipped.filename} is not safe: {member.filename!r} {problem}; nothing was "
                "unpacked"
            )
        seen.add(name)
        if name.parts[:1] == (FOLDER,) and not member.is_dir():
            members.append(member)
    if not members:
        raise DownloadError(
            f"{zipped.filename} contains no folder {FOLDER}, so it is not the ADE20K "
            "archive; delete it"
        )
    return members


def _what_is_missing(folder: Path, sha1: str) -> str | None:
    """Return what is missing in `folder`, or None if the data set is complete."""
    marker = folder / MARKER
    if marker.is_file():
        expected = json.loads(marker.read_text())
        files = sum(len(names) for _, _, names in os.walk(folder)) - 1
        if files < expected["files"]:
            return f"it holds {files:,} of {expected['files']:,} files"
        if expected["sha1"] != sha1:
            return f"it belongs to another archive (SHA-1 {expected['sha1']})"
        return None
    for name, expected in OFFICIAL_COUNTS.items():
        files = len(os.listdir(folder / name)) if (folder / name).is_dir() else 0
        if files < expected:
            return f"{name} holds {files:,} of {expected:,} files"
    return None


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lock the folder; the lock ends with the process and leaves no file behind.

    convert_ade20k.py has a copy of this function, because this file runs without the rest of the
    repository.

    Raises:
        DownloadError: Another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise DownloadError(
            f"another download into {path} is running; wait until it has ended"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Add the file's name to errors of a full disk, which do not name it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            error.filename = str(file)
        raise


def _require_space(path: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(path).free
    if needed > free:
        raise DownloadError(
            f"{path} has {_bytes(free)} free, but {what} need {_bytes(needed)}; make room, "
            "or use another --path"
        )


def _sha1(file: Path) -> str:
    digest = hashlib.sha1()
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--path", default="./ade20k", help="folder that will contain ADEChallengeData2016"
    )
    parser.add_argument("--url", default=URL, help="address of the archive, for a mirror")
    parser.add_argument(
        "--sha1", default=SHA1, help="SHA-1 of the archive, for a mirror that packs it differently"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        download_ade20k(options.path, options.url, options.sha1)
    except KeyboardInterrupt:
        print("interrupted; run the command again to continue", file=sys.stderr)
        return 130
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
