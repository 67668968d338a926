"""A fixture that simulates a machine without compilers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from segmentation.build_tools import missing_build_tools


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Simulate a machine without compilers or headers; yield the only folder on its PATH."""
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path / "include"))
    missing_build_tools.cache_clear()
    yield tmp_path
    missing_build_tools.cache_clear()
