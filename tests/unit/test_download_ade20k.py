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
    """Serves `body` at any path. `faults` is used up one a request: an HTTP status to answer with,
    or a number of bytes after which the connection is cut, given as ('cut', bytes)."""

    daemon_threads = True

    def __init__(self, body: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.faults = body, True, []
        self.requests = []  # the Range header of each
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
        self.wfile.write(body[start:end])
        server.sent += len(body[start:end])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def archive(tmp_path):
    """The bytes of a small archive laid out as the official one."""
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
    """The waits between attempts, which are not waited."""
    waits = []
    monkeypatch.setattr(downloader.time, "sleep", waits.append)
    return waits


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ade20k"


def sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def contents(path) -> dict[str, bytes]:
    """Every file under `path` but the marker, by its name."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != downloader.MARKER]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def test_downloads_and_unpacks_and_removes_the_archive(server, archive, path):
    folder = download_ade20k(path, server.url, sha1(archive))
    assert folder == path / FOLDER
    assert contents(path) == FILES
    assert server.requests == [None]


def test_does_nothing_when_all_is_there(server, archive, path):
    download_ade20k(path, server.url, sha1(archive))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    server.requests.clear()
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == []
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


def test_a_folder_unpacked_by_other_means_is_known_by_its_counts(server, path, monkeypatch):
    counts = dict.fromkeys(downloader.OFFICIAL_COUNTS, 1)
    monkeypatch.setattr(downloader, "OFFICIAL_COUNTS", counts)
    for name, content in FILES.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    download_ade20k(path, server.url)
    assert server.requests == []


def test_an_incomplete_folder_is_left_alone_and_named(server, archive, path):
    download_ade20k(path, server.url, sha1(archive))
    (path / FOLDER / "objectInfo150.txt").unlink()
    with pytest.raises(DownloadError, match="contains 4 of 5 files; move it away"):
        download_ade20k(path, server.url, sha1(archive))
    (path / FOLDER / downloader.MARKER).unlink()
    with pytest.raises(DownloadError, match="images/training contains 1 of 20,210 files"):
        download_ade20k(path, server.url, sha1(archive))
    assert len(contents(path)) == len(FILES) - 1


def test_resumes_a_partial_download(server, archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip.part").write_bytes(archive[:123_456])
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == ["bytes=123456-"]
    assert server.sent == len(archive) - 123_456
    assert contents(path) == FILES


@pytest.mark.parametrize("size", [123_456, None], ids=["part", "complete"])
def test_an_archive_of_the_user_is_used_and_stays(server, archive, path, size):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive[:size])
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == ([f"bytes={size}-"] if size else [])
    assert contents(path) == FILES | {f"{FOLDER}.zip": archive[:size]}


def test_starts_over_where_the_server_knows_no_ranges(server, archive, path):
    server.ranges = False
    path.mkdir()
    (path / f"{FOLDER}.zip.part").write_bytes(archive[:123_456])
    download_ade20k(path, server.url, sha1(archive))
    assert contents(path) == FILES


@pytest.mark.parametrize(
    "partial", [b"of another version", b"x" * 2_000_000], ids=["short", "long"]
)
def test_starts_over_where_the_part_is_of_something_else(server, archive, path, partial, waits):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(partial)
    download_ade20k(path, server.url, sha1(archive))
    assert server.requests == [f"bytes={len(partial)}-", None]
    assert contents(path) == FILES | {f"{FOLDER}.zip": partial}


def test_a_whole_archive_put_there_needs_no_server(archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    download_ade20k(path, "http://127.0.0.1:9/none", sha1(archive))
    assert contents(path) == FILES | {f"{FOLDER}.zip": archive}


def test_goes_on_after_cut_connections_and_server_errors(server, archive, path, waits):
    server.faults = [("cut", 100_000), 503, 429, ("cut", 0), ("cut", 200_000), 500]
    download_ade20k(path, server.url, sha1(archive))
    assert contents(path) == FILES
    assert server.requests == [None] + ["bytes=100000-"] * 4 + ["bytes=300000-"] * 2
    assert server.sent == len(archive)  # no byte twice
    assert waits == [1, 2, 4, 8, 1, 2]  # backs off while nothing comes, starts again when it does


def test_gives_up_and_keeps_the_part(server, archive, path, waits, capsys):
    server.faults = [("cut", 100_000)] + [503] * 50
    arguments = ["--path", str(path), "--url", server.url, "--sha1", sha1(archive)]
    assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "503" in error and "0.1 MB kept" in error
    assert len(waits) == downloader.ATTEMPTS - 1
    server.faults = []
    assert main(arguments) == 0
    assert server.sent == len(archive)


def test_a_server_that_always_cuts_and_knows_no_ranges_is_given_up(server, archive, path, waits):
    server.ranges = False
    server.faults = [("cut", 100_000)] * 50
    with pytest.raises(DownloadError, match="gave up"):
        download_ade20k(path, server.url, sha1(archive))


def test_no_server_and_wrong_addresses(server, archive, path, waits):
    server.faults = [404]
    with pytest.raises(DownloadError, match="404 Not Found; check the address"):
        download_ade20k(path, server.url, sha1(archive))
    assert waits == []
    with pytest.raises(DownloadError, match="Connection refused"):
        download_ade20k(path, "http://127.0.0.1:9/none", sha1(archive))
    with pytest.raises(DownloadError, match="the address must begin with http:// or https://"):
        download_ade20k(path, "mirror/a.zip", sha1(archive))


def test_a_wrong_hash_unpacks_nothing_and_leaves_nothing(server, path):
    with pytest.raises(
        DownloadError, match=f"has SHA-1 {sha1(server.body)} instead of {downloader.SHA1}"
    ):
        download_ade20k(path, server.url)
    assert list(path.iterdir()) == []
    assert server.requests == [None]


def test_looks_for_room_before_it_downloads(server, archive, path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = int(2.1 * len(archive))  # the archive and its files take 2.2 times its size
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda path: usage(0, 0, free))
    with pytest.raises(DownloadError, match=r"1.2 MB of free.*need 1.2 MB; free up some space"):
        download_ade20k(path, server.url, sha1(archive))
    assert list(path.iterdir()) == []


def test_looks_for_room_before_it_unpacks(archive, path, monkeypatch):
    """Also what stops a zip bomb: sizes are what the archive announces, and reading ends there."""
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(downloader.shutil, "disk_usage", lambda path: usage(0, 0, 500_000))
    with pytest.raises(DownloadError, match=r"the 5 files in ADEChallengeData2016.zip need 0.6 MB"):
        download_ade20k(path, sha1=sha1(archive))
    assert contents(path) == {f"{FOLDER}.zip": archive}


def test_a_disk_that_fills_while_downloading(server, archive, path):
    path.mkdir()
    (path / f"{FOLDER}.zip.part").symlink_to("/dev/full")
    with pytest.raises(
        DownloadError, match=r"zip\.part: No space left on device; .* run the command again"
    ):
        download_ade20k(path, server.url, sha1(archive))
    assert server.requests == [None]  # not taken for a network failure


def test_a_disk_that_fills_while_unpacking(archive, path):
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


def test_interrupted_while_unpacking_leaves_no_half_folder(archive, path, monkeypatch, capsys):
    path.mkdir()
    (path / f"{FOLDER}.zip").write_bytes(archive)
    copied = []

    def copy_then_interrupt(source, out, length):
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


def test_two_at_once_do_not_write_over_each_other(server, archive, path):
    path.mkdir()
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
def test_a_hostile_archive_is_refused_whole(tmp_path, archive, info, reason):
    hostile = tmp_path / "hostile.zip"
    hostile.write_bytes(archive)
    with zipfile.ZipFile(hostile, "a") as zipped:
        zipped.writestr(info, b"/etc/passwd")
    before = contents(tmp_path)
    with pytest.raises(DownloadError, match=f"was not unpacked, because its entry .* {reason}"):
        extract(hostile, tmp_path / FOLDER, "")
    assert contents(tmp_path) == before


def test_an_archive_that_lies_about_its_sizes_is_refused(tmp_path):
    """The directory says 10 bytes, the data goes on for a million: no more than 10 are written."""
    file = tmp_path / "liar.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(f"{FOLDER}/bomb", bytes(1_000_000))
    content = file.read_bytes()
    file.write_bytes(content.replace((1_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    with pytest.raises(DownloadError, match=r"cannot be unpacked .*CRC"):
        extract(file, tmp_path / FOLDER, "")
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "no zip"])
def test_a_damaged_archive_is_one_line(tmp_path, archive, damage):
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


def test_says_where_to_train_from(server, archive, path, caplog):
    caplog.set_level(logging.INFO)
    download_ade20k(path, server.url, sha1(archive))
    assert f"train with path={path}" in caplog.text
