"""Tests of checkpointing/saver.py; integration/test_saver.py saves from real runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Event, Time, Timestamp

from checkpointing.saver import Checkpoints
from training.callbacks import EvaluationSchedule


@pytest.fixture
def saver(tmp_path: Path) -> Checkpoints:
    return Checkpoints(str(tmp_path), "4ba", EvaluationSchedule("8ba"), keep=1)


def state_at(batch: int) -> Any:
    return SimpleNamespace(
        timestamp=Timestamp(batch=batch),
        previous_timestamp=Timestamp(batch=batch - 1),
        get_elapsed_duration=lambda: Time.from_timestring("0.5dur"),
    )


@pytest.mark.parametrize(("batch", "expected"), [(3, False), (4, True), (6, False), (8, True)])
def test_save_is_due_at_the_interval(saver: Checkpoints, batch: int, expected: bool) -> None:
    assert saver.save_interval(state_at(batch), Event.BATCH_CHECKPOINT) is expected


def test_save_is_due_when_the_run_is_stopped(saver: Checkpoints) -> None:
    saver.evaluations.postponed = True
    assert saver.save_interval(state_at(3), Event.BATCH_CHECKPOINT)


def test_checking_whether_a_save_is_due_has_no_side_effects(saver: Checkpoints) -> None:
    answers = [saver.save_interval(state_at(4), Event.BATCH_CHECKPOINT) for _ in range(3)]
    assert answers == [True, True, True]
    assert saver.saved_checkpoints == [] and saver.last is None
