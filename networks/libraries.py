"""Helpers for building networks from other libraries and from users' functions.

Each library has a module with a function `build`, which takes the text after the colon in
`model.name` and returns a `Network`. A name from a file is trusted less than a name from the user.
With `from_file`, `build` loads nothing by name or address and runs only the library's own code.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from errors import ModelError, one_line
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD, Network

# Arguments for this project's wrapper `Network`, not for a library.
OF_NETWORK = ("mean", "std", "size_divisor", "channels_last")
# Argument names that would make a library load a file or a URL.
LOADING = re.compile(
    r"pretrained.*|use_pretrained.*|.*_weights|weights.*|checkpoint.*|init_cfg|auto_map|_name_or_path"
)
# Matches strings that cannot be a path or a URL.
PLAIN = re.compile(r"[\w.+-]*")


def foreign_arguments(
    network: str, beside: Mapping[str, Any], state: Iterable[str], where: str
) -> tuple[dict[str, Any], str]:
    """Return the arguments and the name of the network in a library's own weights file.

    Args:
        network: Name of the network, as given by the user.
        beside: Content of the `config.json` that `save_pretrained` wrote next to the file, or an
            empty mapping.
        state: Names of the tensors in the file.
        where: Path of the file.

    Returns:
        The arguments and the name of the network. For transformers, the name refers to the folder
            that contains the config.

    Raises:
        ModelError: The file contains a string that could be a path or a URL.
    """
    kind = network.partition(":")[0]
    if kind == "hf" and "model_type" in beside:
        folder = where if os.path.isdir(where) else os.path.dirname(os.path.abspath(where))
        return {}, f"hf:{folder}"
    if kind == "smp" and "encoder_name" in beside:
        own = {k: v for k, v in beside.items() if not (k == "classes" or k.startswith("_"))}
        return plain(own, where), network
    if kind == "torchvision" and any(name.startswith("aux_classifier.") for name in state):
        return {"aux_loss": True}, network
    return {}, network


def require(package: str, name: str, group: str | None = None) -> Any:
    """Import a package that only some networks need.

    Args:
        package: Name of the package.
        name: Value of `model.name`, for error messages.
        group: Install extra that provides the package, or None if the extra has the package's name.

    Raises:
        ModelError: The package is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise ModelError(
            f"model.name={name} needs {package}; run make install WITH={group or package}"
        )
    return importlib.import_module(package)


def unknown(kind: str, name: str, known: Iterable[str]) -> ModelError:
    """Return an error that suggests networks similar to an unknown name."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:3]
    return ModelError(
        f"model.name={kind}:{name}: no network has this name; use, for example, {' or '.join(near)}"
    )


def call(name: str, builder: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call a library's builder, and turn any error into a one-line ModelError."""
    try:
        return builder(*args, **arguments)
    except ModelError:
        raise
    except Exception as error:  # Other libraries may raise any exception.
        raise ModelError(
            f"model.name={name} cannot be built: {type(error).__name__}: {one_line(error)}"
        ) from error


def plain(value: Any, where: str, key: str = "") -> Any:
    """Return a file's description of its network, without the keys that would load other files.

    Keys that load weights are not needed, because the file already contains the weights.

    Raises:
        ModelError: A string could be a path or a URL.
    """
    if isinstance(value, Mapping):
        left = {k: v for k, v in value.items() if not LOADING.fullmatch(str(k))}
        return {k: plain(v, where, f"{key}.{k}".lstrip(".")) for k, v in left.items()}
    if isinstance(value, list | tuple):
        return [plain(part, where, key) for part in value]
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        raise ModelError(
            f"{where}: rejected, because {key} is {value!r}, which could be a path or a URL; use "
            "a different file"
        )
    return value


def without_own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for the library, without those for the wrapper `Network`."""
    return {name: value for name, value in arguments.items() if name not in OF_NETWORK}


def fetch(name: str, load: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call a function that may download files, and turn any failure into a clear error."""
    try:
        return load(*args, **arguments)
    except OSError as error:
        raise ModelError(
            f"model.name={name}: found neither a folder nor a network on the hub with this name "
            f"({one_line(error)}); give a name from the hub, or a folder written by "
            "save_pretrained"
        ) from error
    except Exception as error:
        raise ModelError(f"model.name={name} cannot be built: {one_line(error)}") from error


def own_network(name: str, num_classes: int, arguments: Mapping[str, Any]) -> Network:
    """Build a network with a user's function, given as `package.module:function`."""
    module, _, function = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"model.name={name}: cannot import the function ({one_line(error)}); check its name, "
            "or add the folder of its module to PYTHONPATH"
        ) from error
    network = call(name, builder, num_classes=num_classes, **without_own(arguments))
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"model.name={name} returns {type(network).__name__}; it must return an nn.Module"
        )
    mean: Any = getattr(network, "mean", IMAGENET_CHANNEL_MEAN)
    std: Any = getattr(network, "std", IMAGENET_CHANNEL_STD)
    size_divisor: Any = getattr(network, "size_divisor", 1)
    return Network(network, name, arguments, mean, std, size_divisor)
