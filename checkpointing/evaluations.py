"""The schedule of a run's evaluations."""

from __future__ import annotations

from composer.core import Event, State
from composer.utils import create_interval_scheduler


class EvaluationSchedule:
    """A function for Composer's `eval_interval` that evaluates at every interval and at the end.

    Args:
        interval: Time between two evaluations, as a Composer time string.

    Attributes:
        due: Whether the current weights still need an evaluation.
        postponed: Whether a stop request has postponed the evaluation to the resumed run.
    """

    def __init__(self, interval: str) -> None:
        self.due = False
        self.postponed = False
        self._is_time = create_interval_scheduler(
            interval, checkpoint_events=False, final_events={Event.FIT_END}
        )

    def __call__(self, state: State, event: Event) -> bool:
        """Return whether Composer should evaluate now."""
        if not self._is_time(state, event):
            return False
        self.due = True
        return not self.postponed
