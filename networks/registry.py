"""Networks by name: from a library, DeepLabV3+ on another backbone, or a user's own.

A checkpoint may also name a network, but that never causes code to run or a path or address to be
loaded. Only networks in the registries of the libraries are built for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from errors import ModelError
from networks import libraries
from networks.base import Network
from networks.depthwise import replace_dilated

# Libraries with a module of the same name here, which is imported when a network of it is named
LIBRARIES = ("mmseg", "torchvision", "smp", "hf", "timm")


def named_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None = None,
    from_file: bool = False,
    vouched: str | None = None,
) -> Network:
    """Build a network of a library, or a user's own network.

    Args:
        name: Library and name, such as `smp:Unet`, with one of the libraries `mmseg`,
            `torchvision`, `smp`, `hf` and `timm`; or `package.module:function`, which is called
            with `num_classes` and the arguments.
        num_classes: Number of classes C.
        arguments: Arguments of the library, and `mean`, `std` and `size_divisor` of `Network`.
        pretrained: Anything but None loads the library's weights; for torchvision, their name.
        from_file: Whether a file names the network, instead of a user. The network is then built
            without paths, downloads or a user's function other than `vouched`.
        vouched: Function that the user has also named, or None.

    Raises:
        ModelError: The network cannot be built, or is not allowed.
    """
    kind, _, rest = name.partition(":")
    if from_file:
        arguments = libraries.plain(arguments, name)
    if kind in LIBRARIES:
        build = importlib.import_module(f"networks.{kind}").build
        given = (rest, num_classes, arguments, pretrained, from_file)
        network = libraries.call(name, build, *given)
    elif from_file and name != vouched:
        raise ModelError(
            f"the file names its network as the function {name}; to allow that code to run, "
            f"give --network {name}"
        )
    else:
        network = libraries.own_network(name, num_classes, arguments)
    replace_dilated(network)
    return network
