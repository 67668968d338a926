"""Segmentation networks from torchvision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchvision import models

from networks.base import Network
from networks.libraries import call, unknown, without_own


def build(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build a segmentation network from torchvision.

    Args:
        name: Name of a torchvision segmentation network.
        num_classes: Number of classes C.
        arguments: Arguments of the network; see `networks.registry.named_network`.
        pretrained: Name of the backbone's weights, or None.
        from_file: Whether the name comes from a file instead of a user, so that no weights are
            loaded.

    Raises:
        ModelError: The network cannot be built.
    """
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise unknown("torchvision", name, known)
    options = {"weights_backbone": pretrained, **without_own(arguments)}
    if from_file:
        options |= {"weights": None, "weights_backbone": None}
    whole = f"torchvision:{name}"
    network = call(whole, models.get_model_builder(name), num_classes=num_classes, **options)
    return Network(network, whole, arguments)
