"""Tests of benchmarks/numbers.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import numbers


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file that has changed since its only commit."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "module.py").write_text("VALUE = 'before'\n")
    who = ["-c", "user.name=Name", "-c", "user.email=name@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(root), *who, *command], check=True)
    (root / "module.py").write_text("VALUE = 'after'\n")
    monkeypatch.setattr(numbers, "ROOT", root)
    return root


def test_files_of_a_commit_are_unpacked(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    numbers.unpack("HEAD", folder)
    assert (folder / "module.py").read_text() == "VALUE = 'before'\n"


def test_unknown_commit_gives_a_one_line_error(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: nope: not a commit in .*valid object name"):
        numbers.unpack("nope", tmp_path)
