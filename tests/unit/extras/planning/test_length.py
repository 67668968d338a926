"""Tests of extras/planning/length.py."""

from __future__ import annotations

import pytest

from extras.planning.length import lengths, passes
from tests.support.plan import config, settings  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network")


def test_planned_batches_evaluations_and_checkpoints_are_counted() -> None:
    config = settings(max_duration="3ep", eval_interval="2ep", eval_first=True)
    assert lengths(config, 10) == (10, 30, 3, 0)
    config.save_folder, config.save_interval = "x", "7ba"
    assert lengths(config, 10).checkpoints == 5
    assert passes(settings(recipe_name="medium")) == 1.5
    assert passes(settings(recipe_name="hot")) == 2 and passes(settings()) == 1
