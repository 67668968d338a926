"""A segmentation network of torchvision with random weights."""

from __future__ import annotations

from torch import nn

LRASPP = "torchvision:lraspp_mobilenet_v3_large"


def torchvision_network(classes: int) -> nn.Module:
    from torchvision.models import segmentation

    return segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes
    )
