"""Tests of training/class_weights.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from errors import ConfigError
from model import ComposerDeepLabV3
from segmentation.losses import segmentation_loss
from tests.support.balance import present  # noqa: F401
from tests.support.paths import ROOT
from training.build_recipe import loss_weights
from training.class_weights import auto_weights, class_weights, repeat_factors
from training.config import resolve


def test_repeat_factors_match_the_lvis_paper() -> None:
    rng = np.random.default_rng(0)
    present = rng.random((200, 6)) < [0.9, 0.5, 0.1, 0.02, 0.005, 0.0]
    present[7] = False
    for threshold in (0.001, 0.05, 0.3):
        expected = []
        for row in present:
            factor = 1.0
            for c in np.flatnonzero(row):
                share = sum(present[:, c]) / 200
                factor = max(factor, math.sqrt(threshold / share))
            expected.append(factor)
        np.testing.assert_allclose(repeat_factors(present, threshold), expected)
    assert repeat_factors(present, 0.3)[7] == 1


def test_automatic_class_weights_match_the_enet_paper() -> None:
    pixels = np.array([400, 590, 10, 0])
    expected = [1 / math.log(1.02 + share) for share in (0.4, 0.59, 0.01, 0.0)]
    assert auto_weights(pixels) == pytest.approx(expected, rel=1e-12)
    assert auto_weights(pixels)[3] == pytest.approx(50.4983, abs=1e-3)


def config_with_weights(tiny: dict[str, Any], weights: Any, **more: Any) -> Any:
    names = str(ROOT / "yamls" / "demo_classes.txt")
    model = {**tiny["model"], "class_weights": weights}
    return resolve({**tiny, "class_names": names, **more, "model": model})


def test_class_weights_are_read_from_lists_and_class_names(tiny: dict[str, Any]) -> None:
    assert loss_weights(config_with_weights(tiny, None), None) is None
    assert class_weights(config_with_weights(tiny, list(range(12))), None) == [
        float(i) for i in range(12)
    ]
    by_name = class_weights(config_with_weights(tiny, {"plain": 3, "waves": 0.5}), None)
    assert by_name == [3.0] + 10 * [1.0] + [0.5]
    assert loss_weights(config_with_weights(tiny, "auto", is_train=False), None) is None
    with pytest.raises(ConfigError, match="no class is named wave; did you mean waves"):
        class_weights(config_with_weights(tiny, {"wave": 3}), None)
    with pytest.raises(
        ConfigError, match=r"auto needs the masks of train_dataset, .*; give the weights as numbers"
    ):
        class_weights(config_with_weights(tiny, "auto"), None)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("some", "'some' must be auto, a list, or {name: weight}"),
        ([1, 2], "got 2 weights for 12 classes; give one weight per class"),
        ([-1] * 12, "-1 must be a finite number of at least 0"),
        ({"plain": "3"}, "'3' must be a finite number"),
        ([0] * 12, "all weights are 0; set at least one above 0"),
    ],
)
def test_invalid_class_weights_give_a_one_line_error(
    tiny: dict[str, Any], weights: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.class_weights: {reason}"):
        config_with_weights(tiny, weights)


def test_model_passes_class_weights_to_the_loss() -> None:
    weights = [3.0, 1.0, 0.5]
    model = ComposerDeepLabV3(torch.nn.Identity(), 3, -1, 0.375, 1.125, weights)
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(2 * 16 * 16).view(2, 16, 16) % 4 - 1
    expected = segmentation_loss(logits, target, class_weights=torch.tensor(weights))
    assert model.loss(logits, (None, target)) == expected
    assert expected["total"] != segmentation_loss(logits, target)["total"]
    assert not model.state_dict()
