"""Tests of training/mixup.py."""

import types

import numpy as np
import pytest
import torch
from composer.core import Event

from segmentation.losses import MixedTarget
from tests.support.algorithms import CLASSES
from training.mixup import MixUp

pytestmark = pytest.mark.filterwarnings("ignore")


def mix(image, target, alpha=0.5):
    state = types.SimpleNamespace(batch=[image, target])
    MixUp(alpha).apply(Event.BEFORE_FORWARD, state, None)
    return state.batch


def test_mixup_mixes_images_and_returns_both_targets():
    np.random.seed(0)
    torch.manual_seed(1)
    image = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    target = torch.randint(-1, CLASSES, (4, 8, 8))
    mixed, mixed_target = mix(image, target)
    assert isinstance(mixed_target, MixedTarget) and 0 < mixed_target.mixing <= 0.5
    assert mixed_target.target is target
    other = [next(j for j in range(4) if torch.equal(target[j], t)) for t in mixed_target.permuted]
    assert sorted(other) == [0, 1, 2, 3] and other != [0, 1, 2, 3]
    m = mixed_target.mixing
    torch.testing.assert_close(mixed, (1 - m) * image + m * image[other])
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_mixup_keeps_a_single_image_and_rejects_negative_alpha():
    image, target = torch.randn(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.int64)
    assert torch.equal(mix(image, target)[0], image)
    image, target = torch.randn(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.int64)
    mixed, mixed_target = mix(image, target, alpha=0)
    assert torch.equal(mixed, image) and mixed_target.mixing == 0
    with pytest.raises(ValueError, match="alpha >= 0"):
        MixUp(-0.1)
