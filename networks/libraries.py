"""Helpers for building networks from other libraries and from users' functions.

Each library has a module with a function `build`, which takes a `Request` and returns a `Network`.
A name from a file is trusted less than a name from the user. With `from_file`, `build` never loads
anything from a name or a URL, and runs only the library's own code.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from errors import ModelError, one_line
from networks.base import Network

# Arguments for this project's wrapper `Network`, not for a library.
OF_NETWORK = ("mean", "std", "size_divisor", "channels_last")
# Argument names that would make a library load a file or a URL.
LOADING = re.compile(
    r"pretrained.*|use_pretrained.*|.*_weights|weights.*|checkpoint.*|init_cfg|auto_map|_name_or_path"
)
# Matches strings that cannot be a path or a URL.
PLAIN = re.compile(r"[\w.+-]*")


class Request(NamedTuple):
    """A request to build a network.

    Attributes:
        name: Name of the network, as in the key `model.name`.
        num_classes: Number of classes C.
        arguments: Arguments of the network; see `networks.registry.named_network`.
        pretrained: If this is not None, the pretrained weights are loaded. For torchvision,
            `pretrained` is the name of the weights.
        from_file: Whether the name comes from a file rather than from a user. If so, nothing is
            downloaded.
    """

    name: str
    num_classes: int
    arguments: Mapping[str, Any]
    pretrained: str | None = None
    from_file: bool = False

    @property
    def name_in_library(self) -> str:
        """The network's name in its library."""
        return self.name.partition(":")[2]

    @property
    def library_arguments(self) -> dict[str, Any]:
        """The arguments that are passed to the library."""
        return {key: value for key, value in self.arguments.items() if key not in OF_NETWORK}

    @property
    def wrapper_arguments(self) -> dict[str, Any]:
        """The arguments that are passed to the wrapper `Network`."""
        return {key: value for key, value in self.arguments.items() if key in OF_NETWORK}

    def recorded_config(self) -> Any:
        """Return the config that was recorded when the network was first built, or None.

        Raises:
            ModelError: The request comes from a file that does not contain the network's config.
        """
        config = self.arguments.get("config")
        if self.from_file and config is None:
            raise ModelError(
                f"{self.name}: the file does not contain the network's config, so the network "
                "cannot be rebuilt; choose a file that contains the config"
            )
        return config


def foreign_arguments(
    network: str, beside: Mapping[str, Any], state: Iterable[str], where: str
) -> tuple[dict[str, Any], str]:
    """Return the name and the arguments of the network of a library's own weights file.

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


def require(package: str, name: str) -> Any:
    """Import a package that only some networks need.

    Args:
        package: Name of the package.
        name: Value of `model.name`. The text before the colon names the extra to install.

    Raises:
        ModelError: The package is not installed; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        extra = name.partition(":")[0]
        raise ModelError(f"model.name={name} needs {package}; run make install WITH={extra}")
    return importlib.import_module(package)


def unknown(request: Request, known: list[str]) -> ModelError:
    """Return an error that suggests networks similar to an unknown name."""
    near = difflib.get_close_matches(request.name_in_library, known, n=3, cutoff=0.5) or known[:3]
    return ModelError(
        f"model.name={request.name}: no network has this name; "
        f"use, for example, {' or '.join(near)}"
    )


def convert_mappings(value: Any, convert: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a copy of a config with a function applied to every mapping, innermost first."""
    if isinstance(value, Mapping):
        return convert({key: convert_mappings(part, convert) for key, part in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(convert_mappings(part, convert) for part in value)
    return value


def plain(value: Any, where: str, key: str = "") -> Any:
    """Return a file's network description, without the keys that would load other files.

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


def fetch(name: str, load: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    """Call a function that may download files, and turn an OSError into a ModelError."""
    try:
        return load(*args, **arguments)
    except OSError as error:
        raise ModelError(
            f"model.name={name}: found neither a folder nor a network on the hub with this name "
            f"({one_line(error)}); give a name from the hub, or a folder written by "
            "save_pretrained"
        ) from error


def own_network(request: Request) -> Network:
    """Build a network with a user's function, given as `package.module:function`."""
    where = f"model.name={request.name}"
    module, _, function = request.name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{where}: cannot import the function ({one_line(error)}); check its name, "
            "or add the folder of its module to PYTHONPATH"
        ) from error
    network = builder(num_classes=request.num_classes, **request.library_arguments)
    if not isinstance(network, nn.Module):
        raise ModelError(f"{where} returns {type(network).__name__}; it must return an nn.Module")
    keys = ("mean", "std", "size_divisor")
    options: dict[str, Any] = {key: getattr(network, key) for key in keys if hasattr(network, key)}
    return Network(network, request.name, request.arguments, **options)
