"""A function that builds a network by name, from a library or a user's own function.

A network name may also come from a checkpoint. Such a name can only select a network from a
library's registry. It never runs the user's code, and never loads a path or URL.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from errors import ModelError, one_line
from networks.base import Network
from networks.depthwise import replace_dilated
from networks.libraries import Request, own_network, plain

# Each library has a module of the same name in this package, which is imported on demand.
LIBRARIES = ("mmseg", "torchvision", "smp", "hf", "timm")


def named_network(
    name: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    pretrained: str | None = None,
    from_file: bool = False,
    vouched: str | None = None,
) -> Network:
    """Build a network from a library or from a user's own function.

    Args:
        name: Library and network name such as `smp:Unet`, where the library is `mmseg`,
            `torchvision`, `smp`, `hf` or `timm`. Alternatively, a function
            `package.module:function`, which is called with `num_classes` and the arguments.
        num_classes: Number of classes C.
        arguments: Arguments for the library's network, and `mean`, `std` and `size_divisor` for
            `Network`.
        pretrained: If this is not None, the library's pretrained weights are loaded. For
            torchvision, it is the name of the weights.
        from_file: Whether the name comes from a file instead of a user. In this case, paths,
            downloads and all functions except `vouched` are rejected.
        vouched: Function that the user explicitly allows, or None.

    Raises:
        ModelError: The network cannot be built or is not allowed.
    """
    kind = name.partition(":")[0]
    build = own_network
    if from_file:
        arguments = plain(arguments, name)
    if kind in LIBRARIES:
        build = importlib.import_module(f"networks.{kind}").build
    elif from_file and name != vouched:
        raise ModelError(
            f"the function {name} builds the file's network; to allow it to run, add "
            f"--network {name}"
        )
    try:
        network = build(Request(name, num_classes, arguments, pretrained, from_file))
    except ModelError:
        raise
    except Exception as error:  # Other libraries may raise any exception.
        raise ModelError(
            f"model.name={name} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error
    replace_dilated(network)
    return network
