"""A network that can train on a single image, because it uses GroupNorm."""

from __future__ import annotations

from torch import nn


def build(num_classes: int) -> nn.Module:
    """Return a network of two layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, num_classes, 1),
    )
