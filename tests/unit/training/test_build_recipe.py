"""Tests of training/build_recipe.py."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import pytest
from composer.algorithms import GradientClipping
from composer.core import State, Time, Timestamp, TimeUnit
from composer.optim import ConstantScheduler, CosineAnnealingScheduler

from errors import ConfigError
from training.build_recipe import build_algorithms, build_schedule, check_times
from training.config import resolve
from training.ema import EMA
from training.mixup import MixUp
from training.sam import SAM
from training.seeding import SeedMicrobatch

EXPECTED = {
    None: ([SeedMicrobatch], CosineAnnealingScheduler),
    "mild": ([SeedMicrobatch, EMA], ConstantScheduler),
    "medium": ([SeedMicrobatch, EMA, SAM, MixUp], ConstantScheduler),
    "hot": ([SeedMicrobatch, EMA, SAM, MixUp], CosineAnnealingScheduler),
}


@pytest.mark.parametrize("recipe", EXPECTED)
def test_each_recipe_has_the_expected_algorithms_and_schedule(
    tiny: dict[str, Any], recipe: str | None
) -> None:
    config = resolve({**tiny, "recipe_name": recipe})
    algorithms, scheduler = build_algorithms(config), build_schedule(config)
    kinds, schedule = EXPECTED[recipe]
    assert [type(algorithm) for algorithm in algorithms] == kinds
    assert type(scheduler.schedule) is schedule


class Progress:
    """A training state of ten epochs of ten batches, with only the attributes schedules read."""

    def __init__(self, batch: int):
        self.timestamp = Timestamp(batch=batch, epoch=batch // 10, batch_in_epoch=batch % 10)
        self.max_duration = Time(10, TimeUnit.EPOCH)
        self.dataloader_len = Time(10, TimeUnit.BATCH)

    def get_elapsed_duration(self) -> Time[float]:
        return Time(self.timestamp.batch.value / 100, TimeUnit.DURATION)


@pytest.mark.parametrize(
    ("schedule", "recipe", "factors"),  # learning rate factors at batches 0, 10, 50 and 100 of 100
    [
        ({}, None, [1, (1 + math.cos(0.1 * math.pi)) / 2, 0.5, 0]),
        ({}, "mild", [1, 1, 1, 1]),
        ({"name": "linear"}, "mild", [1, 0.9, 0.5, 0]),
        ({"name": "linear", "final": 0.2}, None, [1, 0.92, 0.6, 0.2]),
        ({"name": "poly"}, "hot", [1, 0.9**0.9, 0.5**0.9, 0]),
        ({"name": "poly", "power": 2, "final": 0.1}, None, [1, 0.829, 0.325, 0.1]),
        ({"name": "constant", "warmup": "20ba"}, None, [0, 0.5, 1, 1]),
        ({"warmup": "2ep"}, "medium", [0, 0.5, 1, 1]),
        ({"name": "linear", "warmup": 2}, "hot", [0, 0.5, 1 - 30 / 80, 0]),
        ({"name": "poly", "warmup": "20ba"}, None, [0, 0.5, (1 - 30 / 80) ** 0.9, 0]),
        ({"name": "cosine", "warmup": "20ba", "final": 0.5}, "mild", [0, 0.5, 0.84567086, 0.5]),
    ],
)
def test_config_schedule_overrides_the_recipe_schedule(
    tiny: dict[str, Any], schedule: dict[str, Any], recipe: str | None, factors: list[float]
) -> None:
    tiny |= {"schedule": schedule, "recipe_name": recipe, "max_duration": "10ep"}
    scheduler = build_schedule(resolve(tiny))
    actual = [scheduler(cast(State, Progress(batch))) for batch in (0, 10, 50, 100)]
    assert actual == pytest.approx(factors)


def test_gradient_clipping_works_with_any_recipe(tiny: dict[str, Any]) -> None:
    tiny |= {"optimizer": {"lr": 0.1, "clip_norm": 2.5}, "recipe_name": "mild"}
    algorithms = build_algorithms(resolve(tiny))
    assert [type(a) for a in algorithms] == [SeedMicrobatch, GradientClipping, EMA]
    clipping = cast(GradientClipping, algorithms[1])
    assert (clipping.clipping_type, clipping.clipping_threshold) == ("norm", 2.5)


@pytest.mark.parametrize("warmup", ["3ep", "30ba"])
def test_warmup_as_long_as_the_run_is_rejected(tiny: dict[str, Any], warmup: str) -> None:
    tiny |= {"max_duration": "30ba", "schedule": {"warmup": warmup}}
    with pytest.raises(
        ConfigError, match=f"schedule.warmup: {warmup} is at least as long as .*30ba"
    ):
        check_times(resolve(tiny), batches_per_epoch=10)


@pytest.mark.parametrize(
    ("duration", "half_life", "warned"),
    [("2ep", "21ba", True), ("2ep", "20ba", False), ("30ba", "4ep", True), ("80sp", "10ba", False)],
)
def test_ema_half_life_longer_than_the_run_is_warned_about(
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
        check_times(resolve(tiny), batches_per_epoch=10)
    assert ("mild.ema.half_life" in caplog.text) == warned


@pytest.mark.parametrize(
    ("done", "images", "batch_size", "duration", "factors"),
    [
        # The run began with 24 images in batches of 6. The schedule is linear, from 1 to 0.
        pytest.param((1, 4, 0, 0), 24, 6, "4ep", [0.75, 0.6875], id="no change"),
        pytest.param((1, 4, 0, 0), 24, 12, "4ep", [0.75, 0.625], id="larger batches"),
        pytest.param((1, 4, 0, 0), 24, 3, "4ep", [0.75, 0.71875], id="smaller batches"),
        pytest.param((1, 4, 0, 0), 240, 6, "4ep", [0.75, 0.74375], id="more images"),
        pytest.param((1, 6, 2, 12), 24, 12, "4ep", [0.625, 0.5], id="middle of an epoch"),
        pytest.param((1, 4, 0, 0), 24, 12, "8ep", [0.875, 0.8125], id="larger batches, longer run"),
        pytest.param((1, 4, 0, 0), 24, 12, "16ba", [0.75, 0.6875], id="duration in batches"),
    ],
)
def test_resumed_schedule_continues_from_the_completed_epochs(
    tiny: dict[str, Any],
    done: tuple[int, int, int, int],
    images: int,
    batch_size: int,
    duration: str,
    factors: list[float],
) -> None:
    tiny |= {"schedule": {"name": "linear"}, "max_duration": duration}
    tiny["train_dataset"]["batch_size"] = batch_size
    schedule = build_schedule(resolve(tiny))
    epoch, batch, batch_in_epoch, sample_in_epoch = done
    state = SimpleNamespace(
        timestamp=Timestamp(
            epoch=epoch,
            batch=batch,
            batch_in_epoch=batch_in_epoch,
            sample_in_epoch=sample_in_epoch,
            sample=batch * 6,
        ),
        max_duration=Time.from_timestring(duration),
        dataloader_len=Time(images // batch_size, TimeUnit.BATCH),
    )
    actual = [schedule(cast(State, state))]
    state.timestamp = state.timestamp.to_next_batch(samples=batch_size)
    actual.append(schedule(cast(State, state)))
    assert actual == pytest.approx(factors)
    # Composer sets the learning rate of a step at the end of the previous batch.
    assert schedule.before_last_batch(cast(State, state)) == pytest.approx(factors[0])


def test_recorded_config_resolves_to_the_same_config(tiny: dict[str, Any]) -> None:
    """A run records None for the algorithms that a recipe lacks."""
    config = resolve({**tiny, "recipe_name": "medium"})
    assert resolve(asdict(config)) == config
