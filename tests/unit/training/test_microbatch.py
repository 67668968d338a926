"""Tests of training/microbatch.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from errors import ModelError
from tests.support.plan import SIZE, config, footprint, network, settings  # noqa: F401
from training.microbatch import Footprint, choose_microbatch, count, fitting
from training.precision import Precision
from training.schema import Config, TrainDatasetConfig

pytestmark = pytest.mark.usefixtures("small_network")


def test_operation_count_matches_pytorch(network: torch.nn.Module, footprint: Footprint) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(2, 3, SIZE, SIZE, device="cpu"))
    assert 2 * footprint.operations == pytest.approx(3 * counter.get_total_flops(), rel=0.02)
    assert next(network.parameters()).grad is None  # the network itself is unchanged


def test_untraceable_network_falls_back_to_automatic_microbatching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The setting `auto` then works like Composer's automatic micro-batching."""

    class Thresholds(torch.nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            result = super().forward(image)
            return result if result.mean() > 0 else -result

    with pytest.raises(ModelError, match=r"cannot estimate how much memory the network needs: .*"):
        count(Thresholds(3, 5, 1), SIZE, None)
    monkeypatch.setattr("training.microbatch.free_memory", lambda device: pytest.fail("was asked"))
    device: Any = None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = Config(train_dataset=TrainDatasetConfig(batch_size=24), compile=False)
    assert choose_microbatch(config, Thresholds(3, 5, 1), Precision("fp32"), device) == ("auto", 24)
    monkeypatch.undo()
    frozen = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 5, 1))
    unfrozen = count(frozen, SIZE, None)
    frozen[0].requires_grad_(False)
    assert count(frozen, SIZE, None).image <= unfrozen.image


FOOTPRINT = Footprint(100, 0, 50, 1000, 900, 1e9, 1e6, 1e5, 10)


@pytest.mark.parametrize(
    ("free", "changes", "ranks", "expected"),
    [
        (1e9, {}, 1, (128, True)),
        (130_000, {}, 1, (64, True)),
        (5_000, {}, 1, (4, True)),
        (1_000, {}, 1, (2, False)),
        (1_700, {}, 2, (1, True)),  # sync_bn needs only one image per rank
        (5_000, {"device_train_microbatch_size": 8}, 1, (8, False)),
        (5_000, {"activation_memory_budget": 0.5}, 1, (8, True)),
    ],
)
def test_microbatch_is_the_largest_that_fits_in_memory(
    free: float, changes: dict[str, Any], ranks: int, expected: tuple[int, bool]
) -> None:
    config = settings(**changes)
    assert fitting(FOOTPRINT, config, 128, free, ranks) == expected
    at_once, fits = expected
    assert fits == (FOOTPRINT.step(at_once, config, ranks) <= free)


def test_cpu_run_keeps_its_microbatch_size() -> None:
    assert fitting(FOOTPRINT, settings(), 128, 5_000, adapts=False) == (128, False)


def test_recipe_memory_estimate_includes_copies_of_the_weights() -> None:
    memory = [
        FOOTPRINT.step(1, settings(recipe_name=name)) for name in (None, "mild", "medium", "hot")
    ]
    steps = [round((after - before) / 1.05) for before, after in itertools.pairwise(memory)]
    assert steps == [FOOTPRINT.weights, FOOTPRINT.weights, 0]
