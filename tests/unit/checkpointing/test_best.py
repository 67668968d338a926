"""Tests of checkpointing/best.py."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Timestamp

from checkpointing.best import Best
from segmentation.classes import load_classes
from segmentation.metrics import MIoU

pytestmark = pytest.mark.usefixtures("small_network")


def test_best_checkpoint_can_be_chosen_by_the_iou_of_one_class(tmp_path: Path) -> None:
    best = Best("IoU/b", load_classes(["a", "b", "c"], 3), "2ep")
    best.batches_per_epoch = 10
    metric = MIoU(3)

    def evaluate(matrix: list[list[int]], batch: int) -> tuple[bool, bool]:
        metric.reset()
        metric.matrix += torch.tensor(matrix)
        state: Any = types.SimpleNamespace(
            eval_metrics={"eval": {"MIoU": metric}},
            dataloader_label="eval",
            timestamp=Timestamp(batch=batch),
        )
        return best.improved(state), best.is_long_ago(state)

    # Class b does not occur.
    assert evaluate([[1, 0, 0], [0, 0, 0], [0, 0, 1]], 10) == (False, False)
    assert best.value is None
    assert evaluate([[5, 0, 0], [1, 1, 0], [0, 0, 5]], 10) == (True, False)
    assert best.value == 50
    assert evaluate([[9, 0, 0], [1, 1, 0], [0, 0, 9]], 20) == (False, False)
    assert evaluate([[0, 9, 0], [0, 9, 0], [0, 0, 0]], 30) == (False, True)
    other = Best("MIoU", [])
    other.load_state_dict(best.state_dict())
    assert other.value is None


def test_resumed_run_keeps_its_early_stopping_patience() -> None:
    def state(value: float, batch: int) -> Any:
        metric = MIoU(2)
        if not math.isnan(value):
            metric.matrix += torch.tensor([[int(value), 100 - int(value)], [0, 0]])
        return types.SimpleNamespace(
            eval_metrics={"eval": {"MIoU": metric}},
            dataloader_label="eval",
            timestamp=Timestamp(batch=batch),
        )

    best = Best("MIoU", [], "3ba")
    stops = []
    for batch, value in enumerate([50, math.nan, math.nan, 40, 30, 20], 1):
        best.improved(state(value, batch))
        stops.append(best.is_long_ago(state(value, batch)))
        resumed = Best("MIoU", [], "3ba")
        resumed.load_state_dict(best.state_dict())
        best = resumed
    assert stops == [False] * 5 + [True]
