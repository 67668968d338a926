"""Tests of networks/base.py."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

from errors import ModelError
from networks.base import Network
from networks.registry import named_network

MODULE = """
from torch import nn


def build(num_classes, width=4):
    network = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, num_classes, 1))
    network.mean, network.std, network.size_divisor = (127.5,) * 3, (127.5,) * 3, 8
    return network


def as_mapping(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            return {"out": super().forward(image)}

    return Network(3, num_classes, 1)


def fixed(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            assert image.shape[2:] == (64, 64), "not 64 pixels"
            return super().forward(image)

    return Network(3, num_classes, 1)


def no_network(num_classes):
    return "a network"


def wrong(num_classes):
    return nn.Conv2d(3, num_classes + 1, 1)
"""


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def test_the_contract_is_checked() -> None:
    with pytest.raises(
        ModelError, match=r"returns \(2, 4, 32, 32\) for two images; it must return logits \(2, 3"
    ):
        named_network("own_networks:wrong", 3, {}).check(3, [32])
    network = Network(nn.Conv2d(4, 3, 1), "own:x", {})
    with pytest.raises(ModelError, match=r"own:x fails on images of 32 x 32 pixels: .*4 channels"):
        network.check(3, [32])
    network = Network(nn.MaxPool2d(2, return_indices=True), "own:x", {})
    network.register_parameter("w", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="returns tuple; it must return logits as"):
        network.check(3, [32])

    class Viewing(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.view(image.shape[0], -1).view(image.shape))

    network = Network(Viewing(3, 3, 1), "own:x", {})
    network.check(3, [32])
    assert network.arguments["channels_last"] is False
