"""A function that loads the tensors of a weights file that match a network."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from checkpointing.weights import SCORES, Weights
from errors import WeightsError
from networks.base import current_names, inner
from segmentation.classes import ClassInfo, class_key

# Prefixes of tensor names in other projects' checkpoints, and the prefixes that this project uses
# instead.
RENAMES = (("", ""), ("model.", ""), ("decode_head.", "classifier."))


def load_fitting(
    network: nn.Module,
    weights: Weights,
    where: str,
    least: float = 0.5,
    classes: Sequence[ClassInfo] | None = None,
    num_classes: int | None = None,
    class_tensors: Collection[str] = (),
) -> str | None:
    """Load the matching tensors of a file into a network, and leave its other tensors unchanged.

    Args:
        network: Network to load the tensors into.
        weights: Content of the file.
        where: Name of the file, for error messages.
        least: Minimum share of the network's tensors that must match.
        classes: Classes of the network, or None. If given, class names are compared with the
            file's, and the rows of classes with matching names are also loaded.
        num_classes: Number of classes of the network, or None to use the number of rows in
            DeepLabV3's last layer.
        class_tensors: Names of the tensors with one row per class. They are needed only if the file
            has the same number of classes as the network, but the classes themselves differ. Rows
            are then matched by class name, and rows without a match are not loaded.

    Returns:
        A one-line note about the tensors that were not loaded, or None.

    Raises:
        WeightsError: Too few tensors match.
    """
    found = current_names(network, weights.state)
    network = inner(network)
    own = network.state_dict()
    state = max((_renamed(found, *pair) for pair in RENAMES), key=lambda s: len(_fitting(s, own)))
    fitting = _fitting(state, own)
    if len(fitting) < least * len(own):
        raise WeightsError(
            f"{where}: only {len(fitting)} of the network's {len(own)} tensors match, fewer than "
            f"load_least={least:g} requires; choose weights for this network"
        )
    fitting = {name: tensor for name, tensor in fitting.items() if name not in class_tensors}
    left = [name for name in own if name not in fitting]
    rows = num_classes or len(own[f"{SCORES}weight"])
    scores = [n for n in left if n in state and _differs_in_rows(state[n], own[n], rows)]
    network.load_state_dict(fitting, strict=False)
    notes = []
    for layer in dict.fromkeys(name.rpartition(".")[0] for name in scores):
        tensors = [name for name in scores if name.rpartition(".")[0] == layer]
        pairs = _same_names(weights.classes, classes) if classes else []
        with torch.no_grad():
            for name in tensors:
                for new, old in pairs:
                    own[name][new] = state[name][old]
        notes.append(f"{layer}: {_class_note(len(state[tensors[0]]), rows, len(pairs), classes)}")
    left = [name for name in left if name not in scores]
    if left:
        notes.append(f"{len(left)} tensors newly initialised, starting with {left[0]}")
    return f"{where}: {'; '.join(notes)}" if notes else None


def _class_note(before: int, now: int, taken: int, classes: Sequence[ClassInfo] | None) -> str:
    """Describe which rows of a layer with one row per class were loaded."""
    if before == now == taken:
        return "classes in another order, matched by name"
    change = f"{before} -> {now} classes" if before != now else "classes with other names"
    if taken:
        return f"{change}, {taken} loaded by name, the others newly initialised"
    return f"{change}, {'none with the same name, all ' if classes else ''}newly initialised"


def _renamed(state: Mapping[str, Tensor], before: str, after: str) -> dict[str, Tensor]:
    """Replace a prefix in tensor names."""
    return {
        after + name.removeprefix(before) if name.startswith(before) else name: tensor
        for name, tensor in state.items()
    }


def _fitting(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}


def _differs_in_rows(tensor: Tensor, own: Tensor, rows: int) -> bool:
    """Return whether two tensors with one row per class differ only in their number of rows."""
    return tensor.ndim == own.ndim > 0 and tensor.shape[1:] == own.shape[1:] and len(own) == rows


def _same_names(
    before: Sequence[ClassInfo] | None, after: Sequence[ClassInfo]
) -> list[tuple[int, int]]:
    """Return the new and old index of each class whose name is in both lists."""
    places = {class_key(info.name): place for place, info in enumerate(before or ())}
    keys = enumerate(class_key(info.name) for info in after)
    return [(new, places[key]) for new, key in keys if key in places]
