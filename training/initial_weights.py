"""The weights of another run or project, taken over into a run's network."""

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
    """Load the weights that a run begins from, as far as they fit its network and classes.

    Raises:
        ClassError: The weights to evaluate are of other classes.
        ConfigError: `load_classes_by_name`, and the file does not name its classes.
        WeightsError: Fewer tensors fit than `load_least` asks for.
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
        log.warning("load_path: %s", left)


def _compare_classes(config: Config, start: Start, network: nn.Module) -> tuple[bool, list[str]]:
    """Compare the run's classes with those of the weights that it begins from.

    Returns:
        Whether rows of the last layer are taken over by the names of their classes, and the names
        of the tensors with such rows, if the weights have as many classes but not the same.

    Raises:
        ClassError: The weights to evaluate are of other classes.
        ConfigError: The classes are to be matched by name, and the file has no names.
    """
    ours, theirs = class_infos(config), start.weights.classes
    if config.load_classes_by_name and not are_named(theirs):
        raise ConfigError(
            f"load_classes_by_name: {start.where} does not name its classes; leave the key out"
        )
    if theirs is not None and len(theirs) != len(ours):
        return config.load_classes_by_name, []
    try:
        if match_classes(ours, theirs, "the run", start.where) is None:
            return config.load_classes_by_name, []
        by_name = True
    except ClassError as error:
        # An evaluation needs the right row for each class. Training may learn rows anew, as it does
        # for weights with another number of classes.
        if not config.is_train:
            raise ClassError(f"load_path: {error}") from None
        by_name = config.load_classes_by_name
        hint = "" if by_name else "; load_classes_by_name=true takes over those of the same name"
        log.warning("load_path: %s%s", error, hint)
    return by_name, _class_tensors(config, network)


def _class_tensors(config: Config, network: nn.Module) -> list[str]:
    """Return the names of a network's tensors with a row a class: another class makes them longer.

    Raises:
        ClassError: Another class changes more than a number of rows.
    """
    model: dict[str, Any] = {**asdict(config.model), "num_classes": config.model.num_classes + 1}
    larger = inner(create_meta_network(**model)).state_dict()
    own = inner(network).state_dict()
    names = [name for name in own if own[name].shape != larger[name].shape]
    if any(own[name].shape[1:] != larger[name].shape[1:] for name in names):
        raise ClassError(
            f"load_path: its classes are in another order, and {config.model.name} has no layer "
            "with a row a class; list class_names in the order of the checkpoint"
        )
    return names
