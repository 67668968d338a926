"""Functions that find evaluate.py's validation set and match its classes with the model's."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from composer.utils import dist

from dataset.description import ade20k, parse_description, read_description
from dataset.labels import Labels
from dataset.shard_classes import shard_classes
from dataset.shards import DESCRIPTION
from dataset.source import DataSource, ShardOptions
from dataset.workers import available_cores
from errors import ConfigError
from extras.prediction_pipeline import Segmenter
from files import is_remote
from segmentation.classes import match_classes
from training.config import class_infos, load, resolve
from training.schema import Config

log = logging.getLogger(__name__)


def data_source(
    options: argparse.Namespace, segmenter: Segmenter
) -> tuple[DataSource, dict[str, Any]]:
    """Return the validation set named on the command line, in the config or in the checkpoint.

    Args:
        options: Command-line options.
        segmenter: Segmenter to evaluate.

    Returns:
        The data set, and the keyword arguments with which `data.build_ade20k_dataspec` loads it.

    Raises:
        ConfigError: No validation set is named, or it does not match the options or the model.
    """
    config = segmenter.config or {}
    recorded = dict(config.get("eval_dataset") or {})
    if options.config:
        config = asdict(resolve_file(options.config))
    arguments = dict(config.get("eval_dataset") or {})
    raw, where = config.get("data"), options.data or "data"
    if options.data is not None:
        raw = read_description(options.data) if options.data else None
        arguments.update(path=(raw or {}).get("root"), is_streaming=False)
    described = None if raw is None else parse_description(raw, where)
    if options.path:
        streaming = is_remote(options.path) or Path(options.path, "val", "index.json").is_file()
        arguments.update(path=options.path, is_streaming=streaming, local=options.local)
    if not arguments.get("path"):
        raise ConfigError(
            "the checkpoint does not name a validation set; give one with --path or --config"
        )
    if is_remote(arguments["path"]) and not arguments.get("local"):
        raise ConfigError(f"{arguments['path']} is remote; set a cache folder with --local")
    if described is not None and len(described.classes) != len(segmenter.classes):
        raise ConfigError(
            f"{where} has {len(described.classes)} classes, but the model has "
            f"{len(segmenter.classes)}; use data with the model's classes"
        )
    if options.ignore_background is not None:
        if described is not None:
            raise ConfigError(
                "--ignore-background applies only to ADE20K's layout; list the ignored labels "
                f"under ignore in {where}"
            )
        arguments["ignore_background"] = options.ignore_background
    if described is None:
        compare_background(arguments, recorded)
    cores = available_cores() // dist.get_local_world_size()
    arguments.update(
        split="val",
        shuffle=False,
        drop_last=False,
        batch_size=options.batch_size,
        num_workers=min(max(cores - 1, 1), 16),
    )
    labels = Labels(
        len(segmenter.classes),
        arguments.get("ignore_background", True),
        arguments.get("ignore_label"),
    )
    keys = {field.name for field in fields(ShardOptions)} & arguments.keys()
    shards = ShardOptions(**{key: arguments[key] for key in keys})
    source = DataSource(
        arguments["path"],
        "val",
        described or ade20k(labels),
        shards if arguments.get("is_streaming") else None,
    )
    return source, arguments


def resolve_file(path: str) -> Config:
    """Read and check a config file. The data that it names need not exist on this machine."""
    return resolve(load(path, []), with_data=False)


def compare_background(arguments: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    """Check that label 0 has the same meaning as in the evaluations during training.

    Args:
        arguments: `eval_dataset` keys of this evaluation.
        recorded: `eval_dataset` keys in the checkpoint, or an empty mapping.

    Raises:
        ConfigError: The data set is the same, but label 0 has a different meaning.
    """
    ours, theirs = (keys.get("ignore_background", True) for keys in (arguments, recorded))
    if not recorded or ours == theirs:
        return
    new, old = str(ours).lower(), str(theirs).lower()
    paths = [os.path.realpath(keys.get("path") or "") for keys in (arguments, recorded)]
    if paths[0] == paths[1]:
        raise ConfigError(
            f"ignore_background is {new}, but the run used {old} on this data set; remove "
            "--ignore-background"
        )
    log.warning(
        "ignore_background is %s, but the run used %s; label 0 of %s is read with the new value",
        new,
        old,
        arguments["path"],
    )


def class_order(
    options: argparse.Namespace, segmenter: Segmenter, source: DataSource
) -> list[int] | None:
    """Match the validation set's classes with the model's classes.

    Args:
        options: Command-line options.
        segmenter: Segmenter to evaluate.
        source: Validation set.

    Returns:
        For each class of the data, the index of the same class in the model. The result is None if
        the order is the same or no names are known.

    Raises:
        ClassError: The data and the model have different class names.
    """
    own = (segmenter.config or {}).get("data")
    model = segmenter.classes if segmenter.names_given else segmenter.recorded_classes
    if own is not None and not segmenter.names_given:
        # Use the names in the description, because the run may have renamed the classes with the
        # key class_names.
        model = parse_description(own).classes
    beside = shard_classes(source) if source.shards else None
    is_described = source.description.built_in is None
    # The description next to the shards gives the order of their classes.
    if beside is not None:
        where, classes = f"{source.path}/{DESCRIPTION}", beside
    elif is_described and (options.data or options.config):
        where, classes = options.data or options.config, source.description.classes
    elif options.config and options.data is None:
        where, classes = options.config, class_infos(resolve_file(options.config))
    else:
        return None
    order = match_classes(classes, model, where, options.model)
    if order is not None:
        log.warning(
            "%s: its class order differs from the model's, so the classes were matched by name",
            where,
        )
    return order
