"""Networks from segmentation_models.pytorch."""

from __future__ import annotations

from typing import Any

from networks.base import Network
from networks.libraries import Request, require, unknown


def build(request: Request) -> Network:
    """Build a network from segmentation_models.pytorch, such as `Unet`.

    Args:
        request: Name and arguments of the network. Only the encoder has pretrained weights.

    Raises:
        ModelError: The network cannot be built.
    """
    smp = require("segmentation_models_pytorch", request.name)
    base = smp.base.SegmentationModel
    known = [k for k, v in vars(smp).items() if isinstance(v, type) and issubclass(v, base)]
    if request.name_in_library not in known:
        raise unknown(request, known)
    weights = "imagenet" if request.pretrained else None
    options = {"encoder_weights": weights, **request.library_arguments}
    if request.from_file:
        options["encoder_weights"] = None
    network = getattr(smp, request.name_in_library)(classes=request.num_classes, **options)
    normalisation: dict[str, Any] = {}
    if options["encoder_weights"]:
        encoder = str(request.arguments.get("encoder_name", "resnet34"))
        said = smp.encoders.get_preprocessing_params(encoder, options["encoder_weights"])
        factor = 255 / said["input_range"][1]
        normalisation = {key: [factor * value for value in said[key]] for key in ("mean", "std")}
    return Network(network, request.name, request.arguments, size_divisor=32, **normalisation)
