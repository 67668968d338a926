"""Which algorithms and schedule each recipe has, and the warning about a slow average."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from composer.optim import ConstantScheduler, CosineAnnealingScheduler

from training.algorithms import EMA, SAM, MixUp, SeedMicrobatch
from training.config import resolve
from training.recipes import build_recipe, warn_if_ema_is_slow

EXPECTED = {
    None: ([SeedMicrobatch], CosineAnnealingScheduler),
    "mild": ([SeedMicrobatch, EMA], ConstantScheduler),
    "medium": ([SeedMicrobatch, EMA, SAM, MixUp], ConstantScheduler),
    "hot": ([SeedMicrobatch, EMA, SAM, MixUp], CosineAnnealingScheduler),
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_a_recipe_has_its_algorithms_and_schedule(tiny: dict[str, Any], recipe: str | None) -> None:
    algorithms, scheduler = build_recipe(resolve({**tiny, "recipe_name": recipe}))
    kinds, schedule = EXPECTED[recipe]
    assert [type(algorithm) for algorithm in algorithms] == kinds
    assert type(scheduler) is schedule


def test_the_numbers_of_a_recipe_are_keys_of_the_yaml(tiny: dict[str, Any]) -> None:
    tiny["recipe_name"] = "hot"
    tiny["hot"] = {
        "ema": {"half_life": "7ba", "update_interval": "2ba"},
        "sam": {"rho": 0.5, "interval": 3},
        "mixup": {"alpha": 0.9},
    }
    _, ema, sam, mixup = build_recipe(resolve(tiny))[0]
    assert ema.smoothing == pytest.approx(2 ** (-2 / 7))
    assert (sam.rho, sam.interval, mixup.alpha) == (0.5, 3, 0.9)


@pytest.mark.parametrize(
    ("duration", "half_life", "warned"),
    [("2ep", "21ba", True), ("2ep", "20ba", False), ("30ba", "4ep", True), ("80sp", "10ba", False)],
)
def test_an_average_that_outlasts_the_run_is_warned_about(
    tiny: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    duration: str,
    half_life: str,
    warned: bool,
) -> None:
    unit = half_life[-2:]
    ema = {"half_life": half_life, "update_interval": f"1{unit}"}
    tiny |= {"recipe_name": "mild", "mild": {"max_duration": duration, "ema": ema}}
    with caplog.at_level(logging.WARNING):
        warn_if_ema_is_slow(resolve(tiny), batches_per_epoch=10)
    assert ("mild.ema.half_life" in caplog.text) == warned
