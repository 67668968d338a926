"""Tests of extras/planning/estimate.py."""

from __future__ import annotations

from typing import Any

import pytest

from extras.planning.estimate import GPUS, estimate
from extras.planning.length import passes
from tests.support.plan import config, settings  # noqa: F401
from training.microbatch import GIB, Footprint

pytestmark = pytest.mark.usefixtures("small_network")


def test_estimated_speed_follows_the_type_and_number_of_gpus() -> None:
    def speed(name: str, gpus: int, **changes: Any) -> float:
        config = settings(**changes)
        estimated = estimate(FULL, config, name, gpus, passes(config), "amp_bf16", True)
        assert estimated.fastest < estimated.step
        return 128 / estimated.step

    FULL = Footprint(*(int(0.22 * GIB), 0, 0), 1.2 * GIB, GIB, 1.5e12, 8e9, 6e8, 118)
    order = [speed(name, 8) for name in ("T4", "L4", "A100-40GB", "A100", "H100", "H200", "B200")]
    assert order == sorted(order)
    assert 4 < speed("H100", 8) / speed("H100", 1) < 8
    assert speed("H100", 16) / speed("H100", 8) < 2
    assert 1.8 < speed("A100", 8) / speed("A100", 8, recipe_name="hot") < 2
    assert all(gpu.single < gpu.half for gpu in GPUS.values())
