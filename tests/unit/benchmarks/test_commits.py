"""Tests of benchmarks/commits.py."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import commits
from benchmarks.studies import kernels


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One whose module has moved into a package since its only commit."""
    who = ["-c", "user.name=Name", "-c", "user.email=name@example.org"]
    git = ["git", "-C", str(tmp_path), *who]
    (tmp_path / "moved_since.py").write_text("VALUE = 'before'\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "moved_since.py").unlink()
    (tmp_path / "moved_to").mkdir()
    (tmp_path / "moved_to/moved_since.py").write_text("VALUE = 'after'\n")
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("moved_since", "moved_to.moved_since", "moved_to"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("commit", "value"), [(None, "after"), ("HEAD", "before")])
def test_a_commit_is_imported_from_where_it_lay(
    repository: Path, commit: str | None, value: str
) -> None:
    path = list(sys.path)
    with commits.files_of(commit) as name:
        found = commits.imported("moved_to.moved_since", "moved_since")
    assert value == found.VALUE
    assert name == (commit or "the working tree") and sys.path == path


def test_what_is_not_there_is_a_line(repository: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: nope: no commit of .*not a valid object name"):
        commits.unpack("nope", repository)
    with pytest.raises(SystemExit, match=r"none of these modules is there: nowhere, no\.where"):
        commits.imported("nowhere", "no.where")


def test_a_module_that_lacks_another_is_not_passed_over(repository: Path) -> None:
    (repository / "moved_to/moved_since.py").write_text("import lacking_altogether\n")
    with pytest.raises(ModuleNotFoundError, match="lacking_altogether"):
        commits.imported("moved_to.moved_since", "moved_since")


def test_the_kernels_are_where_the_benchmark_looks() -> None:
    from segmentation import losses_triton

    assert kernels.loss_kernels() is losses_triton
