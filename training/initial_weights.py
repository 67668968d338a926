"""Functions that load initial weights from another run or project."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from torch import nn

from checkpointing.partial_load import load_fitting
from checkpointing.resume import Start
from errors import ClassError, ConfigError
from networks.base import inner
from networks.deeplab import create_meta_network
from segmentation.classes import are_named, match_classes
from training.config import class_infos
from training.schema import Config

log = logging.getLogger(__name__)


def load_initial_weights(config: Config, start: Start, network: nn.Module) -> None:
    """Load the initial weights that match a run's network and classes.

    Raises:
        ClassError: The run is an evaluation, and the weights were trained on different classes.
        ConfigError: `load_classes_by_name` is set, but the file does not name its classes.
        WeightsError: Fewer tensors match than `load_least` requires.
    """
    by_name, class_tensors = _compare_classes(config, start, network)
    left = load_fitting(
        network,
        start.weights,
        start.where,
        config.load_least if config.is_train else 1.0,
        class_infos(config) if by_name else None,
        config.model.num_classes,
        class_tensors,
    )
    if left:
        log.warning("%s: %s", _key_of(start), left)


def _key_of(start: Start) -> str:
    """Return the config key that names the file with the initial weights."""
    return "save_folder" if start.is_resume else "load_path"


def _compare_classes(config: Config, start: Start, network: nn.Module) -> tuple[bool, list[str]]:
    """Compare the classes of the run with the classes of its initial weights.

    Returns:
        Whether to match the rows of the last layer by class name, and the names of the tensors that
        have a row for each class. There are no names if the classes are identical, or if the number
        of classes differs.

    Raises:
        ClassError: The run is an evaluation, and the weights were trained on different classes.
        ConfigError: The classes should be matched by name, but the file has no class names.
    """
    ours, theirs = class_infos(config), start.weights.classes
    if config.load_classes_by_name and not are_named(theirs):
        raise ConfigError(
            f"load_classes_by_name: {start.where} does not name its classes; remove the key"
        )
    if theirs is not None and len(theirs) != len(ours):
        return config.load_classes_by_name, []
    try:
        if match_classes(ours, theirs, "the run", start.where) is None:
            return config.load_classes_by_name, []
        by_name = True
    except ClassError as error:
        # An evaluation needs weights that were trained for its own classes, so fail here. Training
        # can learn the new classes, just as it does if the number of classes differs.
        if not config.is_train:
            raise ClassError(f"{_key_of(start)}: {error}") from None
        by_name, hint = config.load_classes_by_name, ""
        if not by_name:
            hint = "; with load_classes_by_name=true, classes of the same name keep their weights"
        log.warning("load_path: %s%s", error, hint)
    return by_name, _class_tensors(config, network)


def _class_tensors(config: Config, network: nn.Module) -> list[str]:
    """Return the names of the tensors that have a row for each class.

    To find these tensors, build the network with one more class and compare the shapes.

    Raises:
        ClassError: Adding a class changes something other than a tensor's number of rows.
    """
    model: dict[str, Any] = {**asdict(config.model), "num_classes": config.model.num_classes + 1}
    larger = inner(create_meta_network(**model)).state_dict()
    own = inner(network).state_dict()
    names = [name for name in own if own[name].shape != larger[name].shape]
    if any(own[name].shape[1:] != larger[name].shape[1:] for name in names):
        raise ClassError(
            "load_path: the checkpoint lists the classes in a different order, and "
            f"{config.model.name} has no layer whose rows can be reordered; list class_names in "
            "the checkpoint's order"
        )
    return names
