"""Tests of extras/planning/measure.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data import build_data
from extras.planning.measure import _store
from tests.support.streaming import write
from training.config import resolve

pytestmark = pytest.mark.usefixtures("small_network")


def test_download_speed_of_the_store_is_measured(
    synthetic: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    remote = write(synthetic, tmp_path / "remote")
    for name in ("train_dataset", "eval_dataset"):
        tiny[name] |= {"is_streaming": True, "path": remote, "local": str(tmp_path / "local")}
    spec = build_data(resolve(tiny), "train")
    measurement = _store(spec.dataloader, str(tmp_path))
    assert measurement is not None and measurement[1] > 0
    files = (tmp_path / "remote/train").glob("*.mds")
    assert measurement[0] == sum(file.stat().st_size for file in files)
