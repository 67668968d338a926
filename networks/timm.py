"""DeepLabV3+ on timm backbones, with a feature pyramid for vision transformers."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from errors import ModelError
from networks.base import Network
from networks.deeplab import DeepLabV3, head
from networks.feature_pyramid import SimpleFeaturePyramid
from networks.libraries import Request, fetch, require, unknown


def build(request: Request) -> Network:
    """Build DeepLabV3+ on a timm backbone, with output stride 8 if the backbone supports it.

    A plain vision transformer has features at only one stride, so it gets a `SimpleFeaturePyramid`.
    The transformer's position embeddings are resized to fit each image.

    Args:
        request: Name and arguments of the backbone. `from_file` is ignored, because
            `named_network` has already removed all keys that would load files.

    Raises:
        ModelError: The network cannot be built.
    """
    timm = require("timm", request.name)
    backbone, arguments = _features(timm, request)
    channels, divisor, neck = backbone.feature_info.channels(), 32, None
    if len(channels) == 1:
        neck = SimpleFeaturePyramid(channels[0])
        channels, divisor = neck.channels, backbone.feature_info.reduction()[0]
    classifier = head(request.num_classes, channels[0], channels[1])
    network = DeepLabV3(backbone, classifier, upsample=False, neck=neck)
    said = timm.get_pretrained_cfg(request.name_in_library)
    normalisation: dict[str, Any] = {}
    if said:
        normalisation = {"mean": [255 * v for v in said.mean], "std": [255 * v for v in said.std]}
    return Network(network, request.name, arguments, size_divisor=divisor, **normalisation)


def _features(timm: Any, request: Request) -> tuple[Any, dict[str, Any]]:
    """Build a timm backbone that returns its stride-4 features and its last features.

    A vision transformer returns only its last features, because all of its features have the same
    stride.

    Returns:
        The backbone and its arguments, including `output_stride` if the backbone has this option.
    """
    whole, name = request.name, request.name_in_library
    if not timm.is_model(name.partition(".")[0]):
        raise unknown(request, timm.list_models())
    options: dict[str, Any] = {"features_only": True, **request.library_arguments}

    def create(**more: Any) -> Any:
        return timm.create_model(name, **options, **more)

    with torch.device("meta"):  # Build the network on the meta device, which allocates no memory.
        if "output_stride" not in options:
            # timm raises various types of errors for an unsupported argument.
            with contextlib.suppress(Exception):
                create(output_stride=8)
                options["output_stride"] = 8
        strides = create().feature_info.reduction()
    options = {"pretrained": bool(request.pretrained), **options}
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
    arguments = dict(request.arguments)
    if "output_stride" in options:
        arguments["output_stride"] = options["output_stride"]
    return backbone, arguments
