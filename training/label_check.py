"""A check for classes that never occur in a run's data, and for masks without labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from segmentation.classes import ClassInfo, label_warning

log = logging.getLogger(__name__)


class _Labels:
    """A counter of one split's labels. Only `gather` makes the CPU wait for the GPU."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.pixels = 0
        # Shape (C + 2,): a flag for each class, a flag for unlabelled pixels, and the number of
        # unlabelled pixels.
        self._counts: Tensor | None = None

    def add(self, target: Any) -> None:
        """Count a batch's class indices (N, H, W); with MixUp, count those in the first target."""
        target = target if isinstance(target, Tensor) else target.target
        none = (target < 0) | (target >= self.num_classes)
        if self._counts is None:
            self._counts = none.new_zeros(self.num_classes + 2, dtype=torch.int64)
        index = torch.where(none, self.num_classes, target.long())
        self._counts.index_fill_(0, index.flatten(), 1)
        self._counts[-1].add_(none.sum())
        self.pixels += target.numel()

    def gather(self) -> tuple[list[bool], float]:
        """Return whether each class occurs on any rank, and the share of unlabelled pixels."""
        assert self._counts is not None
        counts = self._counts.clone()
        # The flag for pixels without a class is not needed, so its slot holds the pixel count.
        counts[-2] = self.pixels
        dist.all_reduce(counts)
        *occurs, total, unlabelled = counts.tolist()
        return [count > 0 for count in occurs], unlabelled / max(total, 1)


class LabelCheck(Callback):
    """A callback that warns if a split has too few labels for training or evaluation.

    Each split is checked once. The validation split is checked at the end of the first evaluation.
    The training split is checked after the first complete epoch, or at the end of a shorter run,
    because a missing class may still occur until then. If the training crops contain fewer than two
    classes by the first evaluation, the warning appears at that point. Once a split has been
    checked, its labels are no longer counted.

    Args:
        classes: Names of the classes.
        background_ignored: Whether label 0 is ignored. If it is, the warning mentions
            `ignore_background`.
    """

    def __init__(self, classes: Sequence[ClassInfo], background_ignored: bool) -> None:
        self.classes = classes
        self.hint = "ignore_background=false makes label 0 a class" if background_ignored else ""
        self._train: _Labels | None = _Labels(len(classes))
        self._val: _Labels | None = _Labels(len(classes))
        self._is_whole = False

    def epoch_start(self, state: State, logger: Logger) -> None:
        self._is_whole = True

    def before_forward(self, state: State, logger: Logger) -> None:
        if self._train:
            self._train.add(state.batch[1])

    def eval_before_forward(self, state: State, logger: Logger) -> None:
        if self._val:
            self._val.add(state.batch[1])

    def epoch_end(self, state: State, logger: Logger) -> None:
        if self._is_whole:
            self._report_training("training crop of the first epoch")

    def fit_end(self, state: State, logger: Logger) -> None:
        self._report_training()

    def eval_end(self, state: State, logger: Logger) -> None:
        if self._val and self._val.pixels:
            occurs, unlabelled = self._val.gather()
            self._val = None
            self._warn("eval_dataset", occurs, "validation mask", unlabelled)
        if self._train and self._train.pixels:
            occurs, _ = self._train.gather()
            if sum(occurs) < 2:
                self._report_training("training crop so far")

    def _report_training(self, crops: str = "training crop") -> None:
        if self._train and self._train.pixels:
            occurs, _ = self._train.gather()
            self._train = None
            # Do not report the share of unlabelled pixels, because random crops are padded with
            # them.
            self._warn("train_dataset", occurs, crops, None)

    def _warn(self, section: str, occurs: list[bool], masks: str, unlabelled: float | None) -> None:
        line = label_warning(occurs, self.classes, masks, unlabelled, self.hint)
        if line and dist.get_global_rank() == 0:
            log.warning("%s: %s", section, line)
