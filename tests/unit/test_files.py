"""Tests of files.py."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import files
from errors import OutputError, UserError, exit_status
from files import (
    check_outputs,
    check_writable,
    output_file,
    output_folder,
    write_file,
    write_image,
)
from tests.support.run_helpers import file_limit


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder by its relative path, hidden files included."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def fill_folder(path: Path) -> None:
    with output_folder(path) as folder:
        write_file(folder / "small.txt", "small")
        write_file(folder / "deep/large.bin", bytes(5000))


def fill_file(path: Path) -> None:
    with output_file(path) as unfinished, open(unfinished, "wb") as file:
        file.write(bytes(100))
        file.write(bytes(5000))


WRITERS = [
    pytest.param(lambda path: write_file(path, bytes(5000)), id="bytes"),
    pytest.param(lambda path: write_file(path, "ä" * 3000), id="text"),
    pytest.param(
        lambda path: write_image(path, Image.effect_noise((99, 99), 99), quality=99), id="image"
    ),
    pytest.param(fill_file, id="writer"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("before", [{}, {"out.jpg": b"before"}], ids=["new file", "existing file"])
def test_full_disk_keeps_the_old_file(
    tmp_path: Path, write: Callable[[Path], None], before: dict[str, bytes]
) -> None:
    for name, data in before.items():
        (tmp_path / name).write_bytes(data)
    with file_limit(1000), pytest.raises(OutputError) as caught:
        write(tmp_path / "out.jpg")
    assert str(caught.value).startswith(f"{tmp_path}/out.jpg: File too large; free up some space")
    assert contents(tmp_path) == before and exit_status(caught.value) == 1
    write(tmp_path / "out.jpg")
    assert len(contents(tmp_path)["out.jpg"]) > 1000


def test_full_disk_leaves_no_folder(tmp_path: Path) -> None:
    with file_limit(1000), pytest.raises(OutputError) as caught:
        fill_folder(tmp_path / "out")
    # The error names the user's path, not the hidden temporary path.
    assert str(caught.value).startswith(f"{tmp_path}/out/deep/large.bin: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_or_quota_at_the_rename_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def replace(*_: object) -> None:  # some file systems report a full disk only here
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(OutputError, match=os.strerror(code)):
        write_file(tmp_path / "out", b"data")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
@pytest.mark.parametrize("output", [output_file, output_folder])
def test_unfinished_output_of_an_interrupted_write_is_removed(
    tmp_path: Path, output: Callable, error: type[BaseException]
) -> None:
    with pytest.raises(error), output(tmp_path / "out") as unfinished:
        write_file(unfinished / "part" if unfinished.is_dir() else unfinished, b"part")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_output_folder_keeps_other_files(tmp_path: Path) -> None:
    write_file(tmp_path / "out/deep/notes.txt", "mine")
    write_file(tmp_path / "out/small.txt", "older")
    fill_folder(tmp_path / "out")
    expected = {"deep/large.bin": bytes(5000), "deep/notes.txt": b"mine", "small.txt": b"small"}
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_permissions_and_symlinks_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    os.link(tmp_path / "real", tmp_path / "hard")
    write_file(tmp_path / "link", b"after")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"after"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    # A hard link to the old file, such as an image linked into a dataset, keeps its data.
    assert (tmp_path / "hard").read_bytes() == b"before"


def test_named_pipe_receives_the_complete_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_file(tmp_path / "pipe", b"data")
    assert os.read(reader, 100) == b"data"
    os.close(reader)
    check_outputs(["/dev/null", "/dev/null"])
    write_file("/dev/null", b"data")
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param(
            "file/out.txt",
            "cannot write {} because of a problem with .*file: ",
            id="file as folder",
        ),
        pytest.param("folder", "cannot write {}: Is a directory", id="folder"),
        pytest.param("x" * 300, "cannot write {}: File name too long", id="too long name"),
    ],
)
def test_invalid_output_path_is_a_user_error(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=reason.format(tmp_path / name)) as caught:
        write_file(tmp_path / name, b"data")
    assert exit_status(caught.value) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_error_about_an_input_names_the_input_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"), output_file(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()


@pytest.mark.parametrize(
    ("outputs", "inputs", "reason"),
    [
        pytest.param(["a", "b"], ["c"], None, id="distinct paths"),
        pytest.param(["a", "./a"], [], "two outputs have this name", id="duplicate output"),
        pytest.param(
            ["b", "deep/../c"],
            ["a", "c"],
            "would be overwritten, but it is an input",
            id="input as output",
        ),
        pytest.param(
            ["link"], ["c"], "would be overwritten, but it is an input", id="link to an input"
        ),
        pytest.param(["deep"], [], "it is a folder", id="folder"),
    ],
)
def test_outputs_must_not_overwrite_inputs_or_each_other(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    outputs: list[str],
    inputs: list[str],
    reason: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deep").mkdir()
    Path("link").symlink_to("c")
    if reason is None:
        check_outputs(outputs, inputs)
    else:
        with pytest.raises(UserError, match=reason):
            check_outputs(outputs, inputs)


def test_check_for_write_access_leaves_no_file(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.csv")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"gone/new.csv: No such file"):
        check_writable(tmp_path / "gone/new.csv")
