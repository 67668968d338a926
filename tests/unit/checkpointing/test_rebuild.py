"""Tests of checkpointing/rebuild.py."""

from __future__ import annotations

import pytest
import torch

from checkpointing import weights as weights_module
from checkpointing.rebuild import build_network
from errors import WeightsError
from tests.support.artifacts import random_network

pytestmark = pytest.mark.usefixtures("small_network")


def test_network_is_rebuilt_from_its_state_dict():
    network = random_network()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        rebuilt = build_network(weights_module.Weights(state))(image)
        expected = network.classifier(tuple(network.backbone(image).values()))
    torch.testing.assert_close(rebuilt, expected)
    del state["classifier.bottleneck.bn.weight"]
    with pytest.raises(
        WeightsError, match=r"Missing key.*classifier\.bottleneck\.bn\.weight"
    ) as error:
        build_network(weights_module.Weights(state))
    assert "\n" not in str(error.value)
