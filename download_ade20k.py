"""Download ADE20K (SceneParsing benchmark, ADEChallengeData2016, 0.9 GB) and unpack it.

    python download_ade20k.py                    # into ./ade20k; train with path=./ade20k
    python download_ade20k.py --path /data/ade20k
    python download_ade20k.py --url http://mirror/ADEChallengeData2016.zip

You can interrupt the download at any time and run the command again to continue. The script
verifies the archive's SHA-1 before unpacking it, and the unpacked folder appears only when it is
complete. If a complete folder already exists, the script does nothing. The archive is downloaded to
`<path>/ADEChallengeData2016.zip.part`, which is deleted after unpacking. If you put a complete or
partial archive at `<path>/ADEChallengeData2016.zip`, the script uses and keeps it. The exit status
is 0 if the data set is complete, 1 after an error, and 130 after an interruption.
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
# Number of files per folder in the official archive, used to check folders that this script did not
# unpack.
OFFICIAL_COUNTS = {
    "images/training": 20_210,
    "images/validation": 2_000,
    "annotations/training": 20_210,
    "annotations/validation": 2_000,
}
# Marker file that extract() writes last. It contains the archive's SHA-1 and number of files.
MARKER = ".complete.json"

# Maximum number of consecutive attempts without progress. The pauses between attempts (1, 2, 4, ...
# s) add up to half a minute.
ATTEMPTS = 6
TIMEOUT = 60  # Number of seconds without data after which an attempt fails.
CHUNK = 1 << 20
# Ratio of the unpacked size on disk to the archive size. JPEG and PNG files hardly shrink in an
# archive, but on disk every file takes up whole blocks.
UNPACKED_SIZE = 1.2
BLOCK = 4096


class DownloadError(RuntimeError):
    """An error that prevents the download, with a one-line message that says what to do."""


def download_ade20k(path: str | Path, url: str = URL, sha1: str = SHA1) -> Path:
    """Download and unpack the data set, unless a complete `<path>/ADEChallengeData2016` exists.

    Args:
        path: Folder that will contain `ADEChallengeData2016`. For training, set `path` to this
            folder.
        url: HTTP(S) URL of the archive. A mirror's archive must match `sha1`.
        sha1: SHA-1 of the archive, as 40 hex digits.

    Returns:
        `<path>/ADEChallengeData2016`.

    Raises:
        DownloadError: The download or the unpacking failed, or an incomplete folder exists.
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
                        "again, or use a different --path"
                    )
                log.info("%s is complete; nothing to do", folder)
            else:
                fetched = fetch(url, archive, sha1)
                extract(fetched, folder, sha1)
                if fetched != archive:
                    fetched.unlink()
                log.info("%s is complete; train with path=%s", folder, path)
    except OSError as error:  # Report disk errors, such as a full disk or a read-only folder.
        raise DownloadError(
            f"{error.filename or path}: {error.strerror or error}; fix this and run the command "
            "again to continue the download"
        ) from error
    return folder


def fetch(url: str, archive: Path, sha1: str) -> Path:
    """Download an archive to a file with the suffix `.part`; continue an earlier download.

    Args:
        url: Address of the archive.
        archive: Path of the archive.
        sha1: SHA-1 of the archive.

    Returns:
        The downloaded file, or `archive` if the user put the complete archive there.

    Raises:
        DownloadError: The server or the disk fails, or the archive has the wrong SHA-1.
    """
    part = archive.with_name(f"{archive.name}.part")
    if _size(archive) > 0:
        if _sha1(archive) == sha1:
            return archive
        if not part.exists():  # Work on a copy, so that the user's file stays unchanged.
            with _naming(part):
                shutil.copyfile(archive, part)
    resumed = _size(part) > 0
    if resumed and _sha1(part) == sha1:
        return part
    _download(url, part)
    found = _sha1(part)
    if found != sha1 and resumed:
        # The part downloaded earlier may belong to a different version of the archive or to a
        # different file.
        log.warning("the continued archive has SHA-1 %s; downloading it from the start", found)
        part.unlink()
        _download(url, part)
        found = _sha1(part)
    if found != sha1:
        part.unlink()
        raise DownloadError(
            f"{url} has SHA-1 {found} instead of {sha1}, so it is not the ADE20K archive "
            "and was deleted; try again, or use a different --url"
        )
    return part


def _download(url: str, archive: Path) -> None:
    """Call `_download_rest` until the file is complete or several attempts add no data."""
    failures, most = 0, _size(archive)
    while True:
        try:
            _download_rest(url, archive)
            return
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            size = _size(archive)
            failures = 1 if size > most else failures + 1
            most = max(most, size)
            if failures == ATTEMPTS:
                raise DownloadError(
                    f"{url}: gave up after {ATTEMPTS} attempts without progress ({error}); run "
                    f"the command again to continue from the {_bytes(size)} kept in {archive}"
                ) from error
            wait = 2 ** (failures - 1)
            log.warning("%s: %s; trying again in %d s", url, error, wait)
            time.sleep(wait)


def _download_rest(url: str, archive: Path) -> None:
    """Request the missing bytes and append them to the file.

    Raises:
        DownloadError: The server rejects the request, or the disk space is insufficient.
        requests.RequestException, urllib3.exceptions.HTTPError: The connection failed. A retry can
            continue the download.
    """
    have = _size(archive)
    headers = {"User-Agent": "ade20k-download/1.0", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        # Status 416 means that the local file is at least as long as the server's file.
        if status == 416 and have:
            if content_range == f"bytes */{have}":
                return
            archive.unlink()
            raise requests.HTTPError("the part downloaded earlier does not match; starting over")
        if status in (408, 425, 429) or status >= 500:
            raise requests.HTTPError(f"HTTP {status} {response.reason}")
        if not response.ok:
            raise DownloadError(f"{url}: got HTTP {status} {response.reason}; check the address")
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
            # Use read1, because iter_content discards data that has already arrived when the
            # connection breaks.
            while chunk := response.raw.read1(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def extract(archive: Path, folder: Path, sha1: str) -> None:
    """Unpack `ADEChallengeData2016/` from the archive to a folder that appears only when complete.

    Args:
        archive: Path of the archive.
        folder: Folder to create.
        sha1: SHA-1 of the archive, which is stored in the folder.

    Raises:
        DownloadError: The archive is damaged or unsafe, or there is not enough disk space. In this
            case, `folder` is not created.
    """
    temporary = folder.with_name(f".{FOLDER}.unpacking")
    # Remove the temporary folder that a killed run left behind.
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _safe_members(zipped)
            size = sum(BLOCK * (member.file_size // BLOCK + 1) for member in members)
            _require_space(folder.parent, size, f"the {len(members):,} files in {archive.name}")
            for member in tqdm(members, unit=" files", desc="unpack", disable=None):
                # zipfile reads no more than the size listed in the archive's directory, and then
                # checks the CRC.
                with _naming(folder.parent / member.filename):
                    zipped.extract(member, temporary)
        marker = {"sha1": sha1, "files": len(members)}
        (temporary / FOLDER / MARKER).write_text(json.dumps(marker) + "\n")
        os.rename(temporary / FOLDER, folder)
    except DownloadError:
        raise
    # zipfile raises many types of errors for a damaged file, including OSError for an invalid seek
    # position.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # The error comes from the disk rather than the archive.
        raise DownloadError(
            f"{archive} cannot be unpacked ({error}); delete it and run the command again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _safe_members(zipped: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Return the archive's regular files in the data set's folder; reject an unsafe archive."""
    members, seen = [], set()
    for member in zipped.infolist():
        name, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        problem = None
        if name.is_absolute() or ".." in name.parts or re.search(r"[\\\0]|^\w:", member.filename):
            problem = "an entry leads outside the target folder"
        elif kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "an entry is a link or a device, not a file"
        elif member.flag_bits & 1:
            problem = "an entry is encrypted"
        elif name in seen:
            problem = "an entry occurs twice"
        if problem:
            raise DownloadError(
                f"{zipped.filename} was not unpacked, because {problem} ({member.filename!r}); "
                "use a different archive"
            )
        seen.add(name)
        if name.parts[:1] == (FOLDER,) and not member.is_dir():
            members.append(member)
    if not members:
        raise DownloadError(
            f"{zipped.filename} contains no folder {FOLDER}, so it is not the ADE20K archive; "
            "delete it and run the command again"
        )
    return members


def _what_is_missing(folder: Path, sha1: str) -> str | None:
    """Describe what a folder lacks, or return None if it is complete."""
    marker = folder / MARKER
    if marker.is_file():
        expected = json.loads(marker.read_text())
        files = sum(len(names) for _, _, names in os.walk(folder)) - 1
        if files < expected["files"]:
            return f"it contains {files:,} of {expected['files']:,} files"
        if expected["sha1"] != sha1:
            return f"it belongs to a different archive (SHA-1 {expected['sha1']})"
        return None
    for name, expected in OFFICIAL_COUNTS.items():
        files = len(os.listdir(folder / name)) if (folder / name).is_dir() else 0
        if files < expected:
            return f"{name} contains {files:,} of {expected:,} files"
    return None


@contextlib.contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Lock a folder until the context or the process ends, without creating a lock file.

    convert_ade20k.py contains a copy of this function, because this script works without the rest
    of the repository.

    Raises:
        DownloadError: Another process holds the lock.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DownloadError(
                f"another download into {path} is running; wait until it ends"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """If the disk is full, add the file's name to the error, which does not include it."""
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
            f"{path} has only {_bytes(free)} of free space, but {what} need {_bytes(needed)}; "
            "free up some space, or use a different --path"
        )


def _sha1(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha1").hexdigest()


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--path", default="./ade20k", help="folder that will contain ADEChallengeData2016")
    add("--url", default=URL, help="address of the archive, for a mirror")
    add("--sha1", default=SHA1, help="SHA-1 of the archive, for a mirror that packs it differently")
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
