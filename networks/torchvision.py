"""Segmentation networks from torchvision."""

from __future__ import annotations

from torchvision import models

from networks.base import Network
from networks.libraries import Request, unknown


def build(request: Request) -> Network:
    """Build a segmentation network from torchvision.

    Args:
        request: Name and arguments of the network.

    Raises:
        ModelError: The network cannot be built.
    """
    known = models.list_models(module=models.segmentation)
    if request.name_in_library not in known:
        raise unknown(request, known)
    options = {"weights_backbone": request.pretrained, **request.library_arguments}
    if request.from_file:
        options |= {"weights": None, "weights_backbone": None}
    builder = models.get_model_builder(request.name_in_library)
    network = builder(num_classes=request.num_classes, **options)
    return Network(network, request.name, request.arguments)
