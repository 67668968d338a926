"""Networks from segmentation_models.pytorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD, Network
from networks.libraries import call, require, unknown, without_own


def build(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build a network from segmentation_models.pytorch, such as `Unet`.

    Args:
        name: Name of a network class.
        num_classes: Number of classes C.
        arguments: Arguments of the network; see `networks.registry.named_network`.
        pretrained: If this is not None, the encoder starts from ImageNet weights.
        from_file: Whether the name comes from a file instead of a user, so that no weights are
            loaded.

    Raises:
        ModelError: The network cannot be built.
    """
    whole = f"smp:{name}"
    smp = require("segmentation_models_pytorch", whole, "smp")
    known = [k for k in vars(smp) if _is_network(getattr(smp, k), smp)]
    if name not in known:
        raise unknown("smp", name, known)
    encoder = str(arguments.get("encoder_name", "resnet34"))
    weights = "imagenet" if pretrained else None
    options = {"encoder_weights": weights, **without_own(arguments)}
    if from_file:
        options["encoder_weights"] = None
    network = call(whole, getattr(smp, name), classes=num_classes, **options)
    mean, std = IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    if options["encoder_weights"]:
        said = call(
            whole, smp.encoders.get_preprocessing_params, encoder, options["encoder_weights"]
        )
        factor = 255 / said["input_range"][1]
        mean, std = ([factor * value for value in said[key]] for key in ("mean", "std"))
    return Network(network, whole, arguments, mean, std, size_divisor=32)


def _is_network(value: Any, smp: Any) -> bool:
    return isinstance(value, type) and issubclass(value, smp.base.SegmentationModel)
