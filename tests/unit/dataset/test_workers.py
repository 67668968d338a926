"""Tests of dataset/workers.py."""

from __future__ import annotations

import os

import pytest

from dataset import workers
from dataset.workers import in_processes
from errors import DataError
from tests.support.paths import ROOT
from tests.support.waits import short_measurement  # noqa: F401


def test_the_number_of_cores_is_asked_for_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has no os.sched_getaffinity."""
    from dataset.workers import available_cores

    assert available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == os.cpu_count()
    root = ROOT
    files = [
        *root.glob("*.py"),
        *(root / "dataset").glob("*.py"),
        *(root / "training").glob("*.py"),
    ]
    assert [f.name for f in files if "sched_getaffinity" in f.read_text()] == ["workers.py"]


def test_a_process_that_dies_is_one_line():
    with pytest.raises(DataError, match="a worker process died"):
        list(in_processes({0: (os._exit, 1)}, workers=1))


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.available_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert workers.available_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers.available_cores() == 1
