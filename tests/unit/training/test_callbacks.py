"""Tests of training/callbacks.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from composer.core import Timestamp

from segmentation.losses import MixedTarget
from segmentation.metrics import confusion_matrix, mean_iou
from training.callbacks import TrainMIoU, main_target


@pytest.mark.parametrize("mixing, expected", [(0.0, 1), (0.5, 1), (0.9, 2)])
def test_main_target_of_mixup_is_the_one_with_the_larger_weight(mixing: float, expected: int):
    first, second = torch.tensor([[[1]]]), torch.tensor([[[2]]])
    assert main_target(MixedTarget(first, second, mixing)).item() == expected
    assert main_target(first).item() == 1


def test_train_miou_is_logged_every_second_batch():
    """Both micro-batches count. SAM's second pass and every other batch do not."""
    torch.manual_seed(0)
    logged: dict[int, float] = {}
    callback = TrainMIoU(2, 3)
    for batch in range(4):
        state = SimpleNamespace(timestamp=Timestamp(batch=batch))
        logger = SimpleNamespace(
            log_metrics=lambda metrics, batch=batch: logged.update(
                {batch: metrics["metrics/train/MIoU"]}
            )
        )
        parts = []
        callback.batch_start(state, logger)
        for _ in range(2):
            callback.before_train_batch(state, logger)
            for _ in range(2):
                target = torch.randint(-1, 3, (2, 8, 8))
                state.outputs, state.batch = torch.randn(2, 3, 4, 4), (None, target)
                parts.append(confusion_matrix(state.outputs, target, 3))
                callback.after_loss(state, logger)
        callback.batch_end(state, logger)
        if batch in (1, 3):
            expected = 100 * mean_iou(parts[0] + parts[1]).item()
            assert logged.pop(batch) == pytest.approx(expected)
    assert not logged
