"""Functions that rebuild a network from a weights file, for evaluation, prediction and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from checkpointing.weights import Weights
from errors import WeightsError
from networks.base import Network, current_names, inner
from networks.deeplab import DeepLabV3, deeplabv3, infer_architecture
from networks.libraries import foreign_arguments
from networks.registry import named_network

# Number of classes in the trial network. No other layer has this many channels.
PROBED = 251


def complete(weights: Weights, where: str, network: str | None) -> Weights:
    """Add the network's name and its number of classes to weights from another project.

    To find the number of classes, the function builds a trial network with `PROBED` classes, a size
    that no other layer has. A tensor of the trial network with `PROBED` rows therefore has one row
    per class. The same tensor in the file has as many rows as there are classes.

    Args:
        weights: Result of `load_weights`. They are returned unchanged if they have a config, or if
            `network` is None.
        where: Name of the weights, for error messages.
        network: Name of the network given by the user, or None.

    Raises:
        WeightsError: The weights do not match this network, or its layers have different numbers of
            classes.
        ModelError: The network cannot be built.
    """
    if weights.config is not None or network in (None, "deeplabv3"):
        return weights
    arguments, name = foreign_arguments(network, weights.beside, weights.state, where)
    built = named_network(name, PROBED, arguments)
    own, state = inner(built).state_dict(), _named_as(weights.state, inner(built))
    counts = {
        len(state[key])
        for key, tensor in own.items()
        if tensor.ndim and len(tensor) == PROBED and key in state and state[key].ndim
        if state[key].shape[1:] == tensor.shape[1:]
    }
    if len(counts) != 1:
        found = "no layer has a row for each class"
        if counts:
            numbers = ", ".join(map(str, sorted(counts)))
            found = f"its layers have different numbers of classes ({numbers})"
        raise WeightsError(
            f"{where}: the weights do not match the network {network}, because {found}; give the "
            "right network with --network"
        )
    model = {"name": network, "arguments": built.arguments, "num_classes": counts.pop()}
    return replace(weights, config={"model": model})


def _named_as(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Remove prefixes shared by all tensor names until some names match the network's."""
    own, state = network.state_dict(), dict(state)
    while state and not own.keys() & state.keys():
        first = {name.partition(".")[0] for name in state}
        if len(first) > 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def build_network(
    weights: Weights, where: str = "these weights", network: str | None = None
) -> DeepLabV3 | Network:
    """Build the network that belongs to these weights, in evaluation mode.

    The logits are not upsampled to the image's size; they stay at the network's own stride.

    Args:
        weights: Result of `load_weights`.
        where: Name of the weights, for error messages.
        network: Name of the network given by the user, or None. A user's own function is called
            only if this argument names it.

    Raises:
        WeightsError: The weights do not match the network.
        ModelError: The network named in the weights cannot be built or is not allowed.
    """
    weights = complete(weights, where, network)
    name, arguments = weights.network
    built: DeepLabV3 | Network
    if network not in (None, name) and weights.config is not None:
        raise WeightsError(
            f"{where}: the network in the file is {name}, not {network}; leave out --network"
        )
    if (network or name) == "deeplabv3":
        built = deeplabv3(**infer_architecture(weights.state, where), sync_bn=False, upsample=False)
    else:
        is_said = weights.config is not None
        built = named_network(
            network or name, weights.num_classes, arguments, None, is_said, network
        )
    try:
        inner(built).load_state_dict(_named_as(current_names(built, weights.state), inner(built)))
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n\t")[1].split())
        raise WeightsError(f"{where}: {problem}") from error
    return built.eval()
