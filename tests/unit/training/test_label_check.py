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


def test_a_class_may_come_until_the_epoch_ends(caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = None
    callback, epoch = check(), state(torch.tensor([[[0, 1, -1]]]))
    callback.epoch_start(epoch, logger)
    callback.before_forward(epoch, logger)
    callback.eval_end(epoch, logger)  # in the middle of the epoch
    assert not warnings(caplog)
    # MixUp's target has the classes of two images; every index beyond the classes is ignored.
    target = torch.tensor([[[2, 2, 7]]])
    callback.before_forward(state(MixedTarget(target, target, 0.3)), logger)
    callback.epoch_end(epoch, logger)
    assert warnings(caplog) == ["train_dataset: no training crop of the first epoch has class car"]
    callback.before_forward(epoch, logger)
    callback.fit_end(epoch, logger)
    assert len(warnings(caplog)) == 1


def test_part_of_an_epoch_after_a_resume_is_not_judged(caplog: pytest.LogCaptureFixture) -> None:
    logger: Any = None
    callback, part = check(), state(torch.tensor([[[0, 1]]]))
    callback.before_forward(part, logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)
    callback.epoch_start(part, logger)
    callback.before_forward(state(torch.tensor([[[2, 3]]])), logger)
    callback.epoch_end(part, logger)
    assert not warnings(caplog)


def test_crops_of_one_class_are_reported_at_the_first_evaluation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback, batch = check(2), state(torch.tensor([[[1, 1, -1]]]))
    callback.before_forward(batch, None)  # pyright: ignore[reportArgumentType]
    callback.eval_end(batch, None)  # pyright: ignore[reportArgumentType]
    line = (
        "train_dataset: no training crop so far has class sky; every labelled pixel is class road"
    )
    assert warnings(caplog) == [line]


def test_validation_says_how_many_pixels_have_no_class(caplog: pytest.LogCaptureFixture) -> None:
    callback, batch = check(2), state(torch.tensor([[[0, 1, -1, -1, -1]]]))
    callback.eval_before_forward(batch, None)  # pyright: ignore[reportArgumentType]
    callback.eval_end(batch, None)  # pyright: ignore[reportArgumentType]
    hint = "ignore_background=false makes label 0 a class"
    assert warnings(caplog) == [f"eval_dataset: 60% of the pixels have no class; {hint}"]
