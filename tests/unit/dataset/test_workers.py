"""Tests of dataset/workers.py."""

from __future__ import annotations

import os

import pytest

from dataset import workers
from dataset.workers import map_chunks
from errors import DataError
from tests.support.paths import ROOT
from tests.support.waits import short_measurement  # noqa: F401


def test_sched_getaffinity_is_used_only_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
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


def die(samples: list[int]) -> None:
    os._exit(1)


def test_dead_worker_process_gives_a_one_line_error():
    with pytest.raises(DataError, match="a worker process died"):
        map_chunks(die, [([0],)], workers=1)


def test_results_are_in_the_order_of_the_chunks() -> None:
    assert map_chunks(sum, [([number],) for number in range(9)], workers=2) == list(range(9))


def test_cores_are_counted_without_sched_getaffinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workers.available_cores() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert workers.available_cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert workers.available_cores() == 1
