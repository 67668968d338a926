"""DeepLabV3+ on timm backbones, with a feature pyramid for vision transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from errors import ModelError
from networks.base import Network
from networks.deeplab import DeepLabV3, head
from networks.feature_pyramid import SimpleFeaturePyramid
from networks.libraries import call, fetch, require, unknown, without_own


def build(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None,
    from_file: bool,
) -> Network:
    """Build DeepLabV3+ on a timm backbone, with output stride 8 if the backbone supports it.

    A plain vision transformer has features at only one stride, so it gets a `SimpleFeaturePyramid`.
    The transformer's position embeddings are resized to fit each image.

    Args:
        name: Name of a timm model.
        num_classes: Number of classes C.
        arguments: Arguments of the backbone; see `networks.registry.named_network`.
        pretrained: If this is not None, the backbone starts from timm's weights.
        from_file: Unused, because `named_network` has already removed keys that would load files.

    Raises:
        ModelError: The network cannot be built.
    """
    whole = f"timm:{name}"
    timm = require("timm", whole, "timm")
    backbone, arguments = _features(timm, name, arguments, pretrained)
    channels, divisor, neck = backbone.feature_info.channels(), 32, None
    if len(channels) == 1:
        neck = SimpleFeaturePyramid(channels[0])
        channels, divisor = neck.channels, backbone.feature_info.reduction()[0]
    network = DeepLabV3(
        backbone, head(num_classes, channels[0], channels[1]), upsample=False, neck=neck
    )
    mean, std = _normalisation(timm, name)
    return Network(network, whole, arguments, mean, std, size_divisor=divisor)


def _features(
    timm: Any, name: str, arguments: Mapping[str, Any], pretrained: str | None
) -> tuple[Any, dict[str, Any]]:
    """Build a timm backbone that returns its stride-4 features and its last features.

    A vision transformer returns only its last features, because all of its features have the same
    stride.

    Returns:
        The backbone and its arguments, including `output_stride` if the backbone has this option.
    """
    whole = f"timm:{name}"
    if not timm.is_model(name.partition(".")[0]):
        raise unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {"features_only": True, **without_own(arguments)}

    def create(**more: Any) -> Any:
        return timm.create_model(name, **options, **more)

    with torch.device("meta"):  # Build the network on the meta device, which allocates no memory.
        if "output_stride" not in options:
            try:
                create(output_stride=8)
                options["output_stride"] = 8
            # timm raises various types of errors for an unsupported argument.
            except Exception:
                pass
        strides = call(whole, create).feature_info.reduction()
    options = {"pretrained": bool(pretrained), **options}
    if set(strides) in ({14}, {16}):
        options = {"dynamic_img_size": True, **options}
        places: tuple[int, ...] = (-1,)
        try:
            with torch.device("meta"):
                create(out_indices=places)
        except TypeError as error:  # Some transformers in timm do not accept dynamic_img_size.
            raise ModelError(
                f"model.name={whole} accepts only one image size; use a vision transformer "
                "that accepts others, such as vit_small_patch16_dinov3"
            ) from error
    elif 4 in strides:
        places = (strides.index(4), len(strides) - 1)
    else:
        raise ModelError(
            f"model.name={whole} has no features of stride 4, only of strides {strides}; use a "
            "different backbone, or a vision transformer with patches of 14 or 16 pixels"
        )
    backbone = fetch(whole, create, out_indices=places)
    if "output_stride" in options:
        arguments = {**arguments, "output_stride": options["output_stride"]}
    return backbone, dict(arguments)


def _normalisation(timm: Any, name: str) -> tuple[list[float], list[float]]:
    """Return a timm network's mean and standard deviation, on the 0-255 scale."""
    said = timm.get_pretrained_cfg(name)
    mean = said.mean if said else (0.485, 0.456, 0.406)
    std = said.std if said else (0.229, 0.224, 0.225)
    return [255 * value for value in mean], [255 * value for value in std]
