"""Tests of networks/base.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from errors import ModelError
from networks.base import Network
from networks.registry import named_network


def test_network_with_invalid_outputs_is_rejected() -> None:
    with pytest.raises(
        ModelError, match=r"shape \(2, 4, 32, 32\) for two images; it must return the shape \(2, 3"
    ):
        named_network("own_networks:wrong", 3, {}).check(3, [32])
    network = Network(nn.Conv2d(4, 3, 1), "own:x", {})
    with pytest.raises(ModelError, match=r"own:x fails on images of 32 x 32 pixels: .*4 channels"):
        network.check(3, [32])
    network = Network(nn.MaxPool2d(2, return_indices=True), "own:x", {})
    network.register_parameter("w", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="returns tuple; it must return the logits as"):
        network.check(3, [32])

    class Viewing(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.view(image.shape[0], -1).view(image.shape))

    network = Network(Viewing(3, 3, 1), "own:x", {})
    network.check(3, [32])
    assert network.arguments["channels_last"] is False
