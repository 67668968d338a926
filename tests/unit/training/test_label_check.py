"""Tests of training/label_check.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segmentation.classes import load_classes
from segmentation.losses import MixedTarget
from tests.support.label_check import warnings
from training.label_check import LabelCheck

pytestmark = pytest.mark.usefixtures("small_network")


def state(target: Any) -> Any:
    return SimpleNamespace(batch=(None, target))


def check(classes: int = 4) -> LabelCheck:
    return LabelCheck(load_classes(["sky", "road", "tree", "car"][:classes], classes), True)


def test_missing_class_is_reported_at_the_end_of_the_epoch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger: Any = None
    callback, epoch = check(), state(torch.tensor([[[0, 1, -1]]]))
    callback.epoch_start(epoch, logger)
    callback.before_forward(epoch, logger)
    callback.eval_end(epoch, logger)  # evaluation in the middle of the epoch
    assert not warnings(caplog)
    # MixUp's target contains the classes of two images. Indices beyond the classes are ignored.
    target = torch.tensor([[[2, 2, 7]]])
    callback.before_forward(state(MixedTarget(target, target, 0.3)), logger)
    callback.epoch_end(epoch, logger)
    assert warnings(caplog) == ["train_dataset: no training crop of the first epoch has class car"]
    callback.before_forward(epoch, logger)
    callback.fit_end(epoch, logger)
    assert len(warnings(caplog)) == 1


def test_partial_epoch_after_resuming_gives_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = None
    callback, part = check(), state(torch.tensor([[[0, 1]]]))
    callback.before_forward(part, logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)
    callback.epoch_start(part, logger)
    callback.before_forward(state(torch.tensor([[[2, 3]]])), logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)


def test_single_class_crops_are_reported_at_the_first_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, batch = check(2), state(torch.tensor([[[1, 1, -1]]]))
    callback.before_forward(batch, None)
    callback.eval_end(batch, None)
    line = (
        "train_dataset: no training crop so far has class sky; every labelled pixel is class road"
    )
    assert warnings(caplog) == [line]


def test_share_of_unlabelled_validation_pixels_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, batch = check(2), state(torch.tensor([[[0, 1, -1, -1, -1]]]))
    callback.eval_before_forward(batch, None)
    callback.eval_end(batch, None)
    hint = "ignore_background=false makes label 0 a class"
    assert warnings(caplog) == [f"eval_dataset: 60% of the pixels have no class; {hint}"]
