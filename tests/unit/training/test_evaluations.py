"""Tests of the evaluation schedule in training/callbacks.py."""

from types import SimpleNamespace
from typing import Any

import pytest
from composer.core import Event, Time, Timestamp

from training.callbacks import EvaluationSchedule


def state(epoch: int = 0, batch: int = 0, elapsed: str = "0.5dur") -> Any:
    """Return a trainer's state at a given epoch and batch of the run."""
    return SimpleNamespace(
        timestamp=Timestamp(epoch=epoch, batch=batch),
        previous_timestamp=Timestamp(epoch=max(epoch - 1, 0), batch=max(batch - 1, 0)),
        get_elapsed_duration=lambda: Time.from_timestring(elapsed),
    )


@pytest.mark.parametrize(
    ("interval", "event", "at", "expected"),
    [
        pytest.param("2ep", Event.EPOCH_END, {"epoch": 2}, True, id="epoch at the interval"),
        pytest.param("2ep", Event.EPOCH_END, {"epoch": 3}, False, id="between epochs"),
        pytest.param("3ba", Event.BATCH_END, {"batch": 6}, True, id="batch at the interval"),
        pytest.param("3ba", Event.BATCH_END, {"batch": 7}, False, id="between batches"),
        pytest.param(
            "3ba", Event.FIT_END, {"batch": 7, "elapsed": "1dur"}, True, id="end of training"
        ),
        pytest.param("3ba", Event.BATCH_CHECKPOINT, {"batch": 6}, False, id="checkpoint event"),
    ],
)
def test_evaluation_is_due_at_the_interval_and_at_the_end(
    interval: str, event: Event, at: dict[str, Any], expected: bool
) -> None:
    schedule = EvaluationSchedule(interval)
    assert schedule(state(**at), event) is expected
    assert schedule.due is expected


def test_stopped_run_postpones_its_evaluation() -> None:
    schedule = EvaluationSchedule("3ba")
    schedule.postponed = True
    assert not schedule(state(batch=3), Event.BATCH_END)
    assert schedule.due
