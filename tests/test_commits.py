"""The commit that benchmarks.numbers compares with."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.numbers import unpack


def test_a_commit_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: nope: no commit of .*not a valid object name"):
        unpack("nope", tmp_path)
