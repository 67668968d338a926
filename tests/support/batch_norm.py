"""A network with BatchNorm layers of several kinds, and a batch to train it with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not affine": {"affine": False},
    "cumulative": {"momentum": None},
    "without statistics": {"track_running_stats": False},
}


def make_network(kind: str = "plain") -> nn.Sequential:
    """Return a network with two BatchNorm layers; the inputs of the second have a mean near 30."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, **KINDS[kind]),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.BatchNorm2d(8, **{"momentum": 0.3, **KINDS[kind]}),
        nn.Conv2d(8, 4, 1),
    )
    nn.init.constant_(network[3].bias, 30.0)
    return network


def make_batch() -> tuple[Tensor, Tensor]:
    """Return four images, and the weight of each output value in the loss."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator) * 2 + 1
    return images, torch.randn(4, 4, 16, 16, generator=generator)
