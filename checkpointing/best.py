"""A tracker of a run's best evaluation, which also decides when to stop early."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from composer.core import State, Time, TimeUnit

from errors import ConfigError
from segmentation.classes import ClassInfo
from segmentation.metrics import MIoU, iou_per_class


class Best:
    """A tracker of a run's best evaluation, whose state is saved in checkpoints.

    Args:
        metric: Metric to compare: `MIoU`, or `IoU/NAME` for a single class.
        classes: Names of the classes.
        patience: Time without improvement after which the run ends, as a time string in `ep` or
            `ba`; None disables early stopping.

    Attributes:
        value: Best score so far, in percent, or None.
        batch: Number of batches done when the best score was reached.
        unscored: Number of batches since the best score that do not count towards `patience`,
            because the evaluations after them had no score.
        batches_per_epoch: Number of batches in an epoch.

    Raises:
        ConfigError: The metric does not exist.
    """

    def __init__(self, metric: str, classes: Sequence[ClassInfo], patience: str | None = None):
        self.metric = metric
        self.patience = patience
        self.value: float | None = None
        self.batch = 0
        self.unscored = 0
        self.batches_per_epoch = 1
        self._evaluated = 0
        self._is_scored = True
        self._class: int | None = None
        if metric != "MIoU":
            names = {f"IoU/{info.name}": index for index, info in enumerate(classes)}
            if metric not in names:
                near = difflib.get_close_matches(metric, ["MIoU", *names], n=1, cutoff=0.0)[0]
                raise ConfigError(f"best_metric: no metric is named {metric}; did you mean {near}?")
            self._class = names[metric]

    def improved(self, state: State) -> bool:
        """Record the evaluation that has just ended, and return whether it is the best so far."""
        metric = state.eval_metrics.get(state.dataloader_label or "", {}).get("MIoU")
        if not isinstance(metric, MIoU):
            return False
        value = float(metric.compute())
        if self._class is not None:
            assert metric.total_matrix is not None
            value = 100 * float(iou_per_class(metric.total_matrix)[self._class])
        batch = state.timestamp.batch.value
        since, self._evaluated = max(self._evaluated, self.batch), batch
        # The score is NaN if no pixel has a label, or if the class occurs in neither the masks nor
        # the predictions. Such a score cannot be compared with the best score, so it does not count
        # towards the patience.
        self._is_scored = not math.isnan(value)
        if not self._is_scored:
            self.unscored += batch - since
            return False
        if self.value is not None and value <= self.value:
            return False
        self.value, self.batch, self.unscored = value, batch, 0
        return True

    def is_long_ago(self, state: State) -> bool:
        """Return whether the last improvement was at least `patience` ago."""
        if self.patience is None or not self._is_scored:
            return False
        patience = Time.from_timestring(self.patience)
        unit = self.batches_per_epoch if patience.unit == TimeUnit.EPOCH else 1
        waited = state.timestamp.batch.value - self.batch - self.unscored
        return waited >= patience.value * unit

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        state = {name: getattr(self, name) for name in ("metric", "value", "batch", "unscored")}
        return {**state, "evaluated": self._evaluated}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state from a checkpoint, unless it belongs to a different metric."""
        if state.get("metric") == self.metric:
            self.value, self.batch = state["value"], state["batch"]
            self.unscored = state.get("unscored", 0)
            self._evaluated = state.get("evaluated", self.batch)
