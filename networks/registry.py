"""Networks by name: of the libraries, of DeepLabV3+ on another backbone, or of one's own.

A file may name a network too, but has no code run on its word: of what it names, only networks of
the libraries' own registries are built, and nothing is loaded from a path or an address.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from errors import ModelError
from networks import libraries
from networks.base import Network
from networks.depthwise import replace_dilated

# Each has a module here, which loads when a network of it is named.
LIBRARIES = ("mmseg", "torchvision", "smp", "hf", "timm")


def named_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None = None,
    from_file: bool = False,
    vouched: str | None = None,
) -> Network:
    """Build a network of a library's or of one's own.

    Args:
        name: `mmseg:`, `torchvision:`, `smp:`, `hf:` or `timm:` and a name of theirs, or
            `package.module:function`, which is called with `num_classes` and the arguments.
        num_classes: Number of classes C.
        arguments: The library's; besides, `mean`, `std` and `size_divisor` of `Network`.
        pretrained: Where not None, begin with the library's weights; for torchvision, their name.
        from_file: Whether a file says so, rather than a user. Such a network is built from what is
            installed, without loading anything more: no path or download, and no function of one's
            own but `vouched`.
        vouched: The function that the user names as well.

    Raises:
        ModelError: It cannot be built, or may not.
    """
    # A run of deeplabv3 needs none of this.

    kind, _, rest = name.partition(":")
    if from_file:
        arguments = libraries.plain(arguments, name)
    if kind in LIBRARIES:
        build = importlib.import_module(f"networks.{kind}").build
        given = (rest, num_classes, arguments, pretrained, from_file)
        network = libraries.call(name, build, *given)
    elif from_file and name != vouched:
        raise ModelError(
            f"the file names a function, {name}, as its network; to have that code run, say so: "
            f"--network {name}"
        )
    else:
        network = libraries.own_network(name, num_classes, arguments)
    replace_dilated(network)
    return network
