"""A run's network by the keys below `model`: DeepLabV3+, or one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from errors import ModelError
from networks.batch_norm import share_in_node
from networks.deeplab import deeplabv3


def create_network(
    name: str = "deeplabv3",
    arguments: Mapping[str, Any] | None = None,
    *,
    num_classes: int,
    backbone_arch: str = "resnet101",
    backbone_weights: str | None = None,
    sync_bn: bool = True,
    use_plus: bool = True,
    init_fn: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Build a run's network by the keys below `model`; its logits have the network's stride.

    Args:
        name: `"deeplabv3"`, or a name for `named_network`.
        arguments: Arguments of a network other than `deeplabv3`.
        num_classes: Number of classes C.
        backbone_arch: See `deeplabv3`.
        backbone_weights: See `deeplabv3`. Other networks begin with their library's weights if it
            is not None.
        sync_bn: Whether BatchNorm statistics are shared by the processes of a node.
        use_plus: See `deeplabv3`.
        init_fn: See `deeplabv3`. Other networks are initialised as their library does.

    Raises:
        ModelError: The network cannot be built.
    """
    if name == "deeplabv3":
        if arguments:
            raise ModelError("model.arguments: deeplabv3 has keys of its own, beside this one")
        return deeplabv3(
            num_classes, backbone_arch, backbone_weights, sync_bn, use_plus, init_fn, upsample=False
        )
    from networks.registry import named_network

    network = named_network(name, num_classes, arguments or {}, backbone_weights)
    if sync_bn:
        share_in_node(network)
    return network


def create_meta_network(
    name: str,
    arguments: Mapping[str, Any] | None,
    num_classes: int,
    backbone_arch: str,
    use_plus: bool,
    **_: Any,
) -> nn.Module:
    """Build a network on the device "meta", for its shapes.

    Args:
        name: See `create_network`, as for the next four.
        arguments: Arguments of a network other than `deeplabv3`.
        num_classes: Number of classes C.
        backbone_arch: A torchvision ResNet.
        use_plus: DeepLabV3+ rather than DeepLabV3.
        **_: Other keys below `model`, which change no shape.
    """
    # Networks of other libraries read numbers off tensors while they are built.
    with torch.device("meta" if name == "deeplabv3" else "cpu"):
        network = create_network(
            name,
            arguments,
            num_classes=num_classes,
            backbone_arch=backbone_arch,
            sync_bn=False,
            use_plus=use_plus,
        ).to("meta")
    # torch's overloads of `to` leave out the memory format.
    return network.to(memory_format=network.memory_format)  # pyright: ignore
