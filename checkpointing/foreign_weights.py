"""Functions that read weights files from other projects and libraries."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from errors import WeightsError
from segmentation.classes import ClassInfo, load_classes

# Matches the keys under which other projects save averaged weights.
AVERAGE = re.compile(r"(^|[_.-])(ema|swa|avg|averaged?|shadow)([_.-]|$)", re.IGNORECASE)


def select_network(
    tensors: Mapping[str, dict[str, Tensor]], which: str
) -> tuple[dict[str, Tensor], str]:
    """Return the weights in another project's file, and whether they are averaged.

    The network is at the top level of the file or in one of its entries, whichever has the most
    tensors. If the name of an entry suggests averaged weights, such as "ema", its tensors replace
    the training weights of the same names.

    Args:
        tensors: For each entry of the file, its tensors by name. The key "" holds the tensors at
            the top level of the file.
        which: Weights to return: `"ema"` to prefer averaged weights, or `"training"` to ignore
            them.

    Raises:
        WeightsError: Several entries tie for the most tensors, so it is unclear which one is the
            network.
    """
    averages = [part for key, part in tensors.items() if AVERAGE.search(key) and part]
    training = {key: part for key, part in tensors.items() if not AVERAGE.search(key)}
    most = max(map(len, training.values()))
    largest = [key for key, part in training.items() if len(part) == most]
    if not most:
        return (averages[0], "ema") if averages else ({}, "training")
    if len(largest) > 1:
        listed = " and ".join(largest)
        raise WeightsError(
            f"the file contains several networks ({listed}); save the network that you need in a "
            "separate file"
        )
    state = training[largest[0]]
    for part in averages if which == "ema" else []:
        averaged = {name: tensor for name, tensor in part.items() if name in state}
        if averaged:
            return {**state, **averaged}, "ema"
    return state, "training"


def classes_of_mmseg(content: Mapping[str, Any]) -> list[ClassInfo] | None:
    """Return the classes listed in an mmsegmentation checkpoint, or None."""
    meta = content.get("meta")
    names = meta.get("CLASSES") if isinstance(meta, Mapping) else None
    if not isinstance(names, list | tuple):
        return None
    return load_classes([str(name) for name in names], len(names))


def read_config_beside(path: Path) -> tuple[Mapping[str, Any], list[ClassInfo] | None]:
    """Return the `config.json` that `save_pretrained` wrote next to a file, and its classes.

    If there is no `config.json`, the config is empty.
    """
    try:
        beside = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # config.json is missing or cannot be read.
        return {}, None
    if not isinstance(beside, Mapping):
        return {}, None
    labels = beside.get("id2label")
    names = [str(name) for name in labels.values()] if isinstance(labels, Mapping) else []
    if not names or names[0].startswith("LABEL_"):
        return beside, None
    return beside, load_classes(names, len(names))
