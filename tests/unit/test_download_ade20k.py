"""Tests of download_ade20k.py."""

import hashlib
import logging
import os
import resource
import stat
import threading
import zipfile
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import download_ade20k as downloader
from download_ade20k import FOLDER, DownloadError, download_ade20k, extract, main

FILES = {
    f"{FOLDER}/images/training/ADE_train_00000001.jpg": os.urandom(300_000),
    f"{FOLDER}/annotations/training/ADE_train_00000001.png": os.urandom(50_000),
    f"{FOLDER}/images/validation/ADE_val_00000001.jpg": os.urandom(200_000),
    f"{FOLDER}/annotations/validation/ADE_val_00000001.png": b"",
    f"{FOLDER}/objectInfo150.txt": b"Idx\tRatio\n",
}


class Server(ThreadingHTTPServer):
    """An HTTP server that serves `body` at any path. Each request takes one entry of `faults`: an
    HTTP status for the response, or ('cut', bytes) to close the connection after some bytes."""

    daemon_threads = True

    def __init__(self, body: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.faults = body, True, []
        self.requests = []  # the Range header of each request
        self.sent = 0
        self.url = f"http://127.0.0.1:{self.server_port}/ADEChallengeData2016.zip"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, body = self.server, self.server.body
        requested = self.headers.get("Range")
        server.requests.append(requested)
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = int(requested[len("bytes=") : -1]) if requested and server.ranges else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if requested and server.ranges else 200)
        if requested and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = start + fault[1] if fault else len(body)
        # Count before writing, because the client may finish before this thread continues.
        server.sent += len(body[start:end])
        self.wfile.write(body[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive(tmp_path):
    """Return the bytes of a small archive with the layout of the official one."""
    file = tmp_path / "archive" / "archive.zip"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{FOLDER}/", b"")
        for name, content in FILES.items():
            zipped.writestr(name, content)
    return file.read_bytes()


@pytest.fixture
def server(archive):
    with Server(archive) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch):
    """Return a list that records the waits between attempts, and skip them."""
    waits = []
    monkeypatch.setattr(downloader.time, "sleep", waits.append)
    return waits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ade20k"


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def contents(path) -> dict[str, bytes]:
    """Return the content of each file below `path` by its name, except the marker."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != downloader.MARKER]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_archive_is_downloaded_unpacked_and_removed(server, archive, path):
    folder = download_ade20k(path, server.url, sha1(archive))
    assert folder == path / FOLDER
    assert contents(path) == FILES
    assert server.requests == [None]


def test_complete_folder_is_not_downloaded_again(server, archive, path):
    download_ade20k(path, server.url, sha1(archive))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    server.requests.clear()
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == []
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_folder_unpacked_by_hand_is_recognised_by_its_counts(server, path, monkeypatch):
    counts = dict.fromkeys(downloader.OFFICIAL_COUNTS, 1)
    monkeypatch.setattr(downloader, "OFFICIAL_COUNTS", counts)
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    download_ade20k(path, server.url)
    assert server.requests == []


def test_incomplete_folder_is_kept_and_reported(server, archive, path):
    download_ade20k(path, server.url, sha1(archive))
    (path / FOLDER / "objectInfo150.txt").unlink()
    with pytest.raises(DownloadError, match="contains 4 of 5 files; move it away"):
        download_ade20k(path, server.url, sha1(archive))
    (path / FOLDER / downloader.MARKER).unlink()
    with pytest.raises(DownloadError, match="images/training contains 1 of 20,210 files"):
        download_ade20k(path, server.url, sha1(archive))
    assert len(contents(path)) == len(FILES) - 1


def test_partial_download_is_resumed(server, archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip.part").write_bytes(archive[:123_456])
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == ["bytes=123456-"]
    assert server.sent == len(archive) - 123_456
    assert contents(path) == FILES


@pytest.mark.parametrize("size", [123_456, None], ids=["partial", "complete"])
def test_user_supplied_archive_is_used_and_not_deleted(server, archive, path, size):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive[:size])
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == ([f"bytes={size}-"] if size else [])
    assert contents(path) == FILES | {f"{FOLDER}.zip": archive[:size]}


def test_download_restarts_if_the_server_does_not_support_ranges(server, archive, path):
    server.ranges = False
    path.mkdir()
    (path / f"{FOLDER}.zip.part").write_bytes(archive[:123_456])
    download_ade20k(path, server.url, sha1(archive))
    assert contents(path) == FILES


@pytest.mark.parametrize(
    "partial", [b"of another version", b"x" * 2_000_000], ids=["short", "long"]
)
def test_download_restarts_if_the_partial_file_does_not_match(
    server, archive, path, partial, waits
):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(partial)
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == [f"bytes={len(partial)}-", None]
    assert contents(path) == FILES | {f"{FOLDER}.zip": partial}


def test_complete_user_supplied_archive_needs_no_server(archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    download_ade20k(path, "http://127.0.0.1:9/none", sha1(archive))
    assert contents(path) == FILES | {f"{FOLDER}.zip": archive}


def test_download_continues_after_lost_connections(server, archive, path, waits):
    server.faults = [("cut", 100_000), 503, 429, ("cut", 0), ("cut", 200_000), 500]
    download_ade20k(path, server.url, sha1(archive))
    assert contents(path) == FILES
    assert server.requests == [None] + ["bytes=100000-"] * 4 + ["bytes=300000-"] * 2
    assert server.sent == len(archive)  # no byte is sent twice
    assert waits == [1, 2, 4, 8, 1, 2]  # waits double until data arrives, then restart at 1 s


def test_failed_download_keeps_its_partial_file(server, archive, path, waits, capsys):
    server.faults = [("cut", 100_000)] + [503] * 50
    arguments = ["--path", str(path), "--url", server.url, "--sha1", sha1(archive)]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "503" in error and "0.1 MB kept" in error
    assert len(waits) == downloader.ATTEMPTS - 1
    server.faults = []
    assert main(arguments) == 0
    assert server.sent == len(archive)


def test_download_that_cannot_resume_gives_up_after_repeated_failures(server, archive, path, waits):
    server.ranges = False
    server.faults = [("cut", 100_000)] * 50
    with pytest.raises(DownloadError, match="gave up"):
        download_ade20k(path, server.url, sha1(archive))


def test_unreachable_server_and_wrong_address_give_an_error(server, archive, path, waits):
    server.faults = [404]
    with pytest.raises(DownloadError, match="404 Not Found; check the address"):
        download_ade20k(path, server.url, sha1(archive))
    assert waits == []
    with pytest.raises(DownloadError, match="Connection refused"):
        download_ade20k(path, "http://127.0.0.1:9/none", sha1(archive))
    with pytest.raises(DownloadError, match="the address must begin with http:// or https://"):
        download_ade20k(path, "mirror/a.zip", sha1(archive))


def test_archive_with_a_wrong_hash_is_deleted(server, path):
    with pytest.raises(
        DownloadError, match=f"has SHA-1 {sha1(server.body)} instead of {downloader.SHA1}"
    ):
        download_ade20k(path, server.url)
    assert list(path.iterdir()) == []
    assert server.requests == [None]


def test_free_space_is_checked_before_the_download(server, archive, path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = int(2.1 * len(archive))  # the archive and its files take 2.2 times its size
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(DownloadError, match=r"1.2 MB of free.*need 1.2 MB; free up some space"):
        download_ade20k(path, server.url, sha1(archive))
    assert list(path.iterdir()) == []


def test_free_space_is_checked_before_unpacking(archive, path, monkeypatch):
    """This check also stops zip bombs, because extraction ends at the sizes in the archive."""
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda path: usage(0, 0, 500_000))
    with pytest.raises(DownloadError, match=r"the 5 files in ADEChallengeData2016.zip need 0.6 MB"):
        download_ade20k(path, sha1=sha1(archive))
    assert contents(path) == {f"{FOLDER}.zip": archive}


def test_disk_full_during_the_download_gives_an_error(server, archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip.part").symlink_to("/dev/full")
    with pytest.raises(
        DownloadError, match=r"zip\.part: No space left on device; .* run the command again"
    ):
        download_ade20k(path, server.url, sha1(archive))
    assert server.requests == [None]  # a full disk is not a network failure


def test_disk_full_while_unpacking_leaves_only_the_archive(archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, limits[1]))
    try:
        with pytest.raises(
            DownloadError, match=rf"{path}/{FOLDER}/.*: File too large; .* run the command again"
        ):
            download_ade20k(path, sha1=sha1(archive))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(path) == {f"{FOLDER}.zip": archive}
    assert download_ade20k(path, sha1=sha1(archive)) == path / FOLDER


def test_interrupted_unpacking_leaves_no_partial_folder(archive, path, monkeypatch, capsys):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    copied = []

    def copy_then_interrupt(source, out):
        if copied:
            raise KeyboardInterrupt
        copied.append(out.write(source.read()))

    monkeypatch.setattr(downloader.shutil, "copyfileobj", copy_then_interrupt)
    arguments = ["--path", str(path), "--sha1", sha1(archive)]
    assert main(arguments) == 130
    assert "run the command again" in capsys.readouterr().err
    assert contents(path) == {f"{FOLDER}.zip": archive}
    monkeypatch.undo()
    assert main(arguments) == 0
    assert contents(path) == FILES | {f"{FOLDER}.zip": archive}


def test_simultaneous_downloads_are_rejected(server, archive, path):
    path.mkdir()
    with pytest.raises(BlockingIOError), downloader._only_one(path):
        raise BlockingIOError  # Only an error from the lock means that another download is running.
    with downloader._only_one(path), pytest.raises(DownloadError, match="another download into"):
        download_ade20k(path, server.url, sha1(archive))
    download_ade20k(path, server.url, sha1(archive))


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (member("../outside.txt"), "leads outside"),
        (member(f"{FOLDER}/../../outside.txt"), "leads outside"),
        (member("/tmp/outside.txt"), "leads outside"),
        (member("C:/outside.txt"), "leads outside"),
        (member(f"{FOLDER}\\..\\outside.txt"), "leads outside"),
        (member(f"{FOLDER}/link", stat.S_IFLNK | 0o777), "is a link or a device"),
        (member(f"{FOLDER}/device", stat.S_IFBLK | 0o600), "is a link or a device"),
        (member(f"{FOLDER}/pipe", stat.S_IFIFO | 0o600), "is a link or a device"),
        (member(f"{FOLDER}/objectInfo150.txt"), "occurs twice"),
    ],
    ids=lambda value: getattr(value, "filename", None),
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_malicious_archive_is_rejected_completely(tmp_path, archive, info, reason):
    hostile = tmp_path / "hostile.zip"
    hostile.write_bytes(archive)
    with zipfile.ZipFile(hostile, "a") as zipped:
        zipped.writestr(info, b"/etc/passwd")
    before = contents(tmp_path)
    with pytest.raises(DownloadError, match=f"was not unpacked, because an entry {reason}.* \\("):
        extract(hostile, tmp_path / FOLDER, "")
    assert contents(tmp_path) == before


def test_archive_with_false_sizes_is_rejected(tmp_path):
    """The zip directory states 10 bytes for a million bytes, so at most 10 bytes are written."""
    file = tmp_path / "liar.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{FOLDER}/bomb", bytes(1_000_000))
    content = file.read_bytes()
    file.write_bytes(content.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DownloadError, match=r"cannot be unpacked .*CRC"):
        extract(file, tmp_path / FOLDER, "")
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "no zip"])
def test_damaged_archive_gives_a_one_line_error(tmp_path, archive, damage):
    file = tmp_path / "damaged.zip"
    if damage == "cut":
        file.write_bytes(archive[:-1000])
    elif damage == "flipped":
        file.write_bytes(archive[:100_000] + b"flipped" + archive[100_007:])
    elif damage == "no zip":
        file.write_bytes(b"<html>Not found</html>")
    else:
        with zipfile.ZipFile(file, "w") as zipped:
            zipped.writestr("readme.txt", "another archive")
    with pytest.raises(
        DownloadError, match=r"damaged.zip (cannot be unpacked|contains no folder)"
    ) as raised:
        extract(file, tmp_path / FOLDER, "")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / FOLDER).exists()
    assert not list(tmp_path.glob(".*"))


def test_dataset_path_for_training_is_logged(server, archive, path, caplog):
    caplog.set_level(logging.INFO)
    download_ade20k(path, server.url, sha1(archive))
    assert f"train with path={path}" in caplog.text
