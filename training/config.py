"""Functions that load a run's YAML config and convert it to the typed schema.

    config = load("yamls/deeplabv3.yaml", ["recipe_name=mild"])  # the command line does this
    config = resolve(config)  # main(config) does this

This module does not import torch, so that errors in a config are reported immediately.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from errors import ConfigError
from training.config_checks import check, check_evaluates, lookup, per_process, time_pattern
from training.keys import fields_of, flatten, keys_of
from training.launcher import end_with_launcher, is_first_to_refuse, wait_for_nodes, was_refused
from training.recipes import RECIPES
from training.schema import Config, EvalDatasetConfig, TrainDatasetConfig
from training.yaml_text import quote_text

if TYPE_CHECKING:
    from dataset.source import DataSource
    from segmentation.classes import ClassInfo

# Config keys for input files and folders. Their paths may be relative to the YAML file's folder.
INPUT_PATHS = (
    "class_names",
    "data",
    "load_path",
    "train_dataset.path",
    "eval_dataset.path",
    "model.backbone_weights",
)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn any OmegaConf error into a ConfigError that names the key."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{key}{_one_line(error)}") from error


@one_line_errors()
def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a YAML config and apply `key=value` overrides.

    An override of `max_duration` also replaces the recipe's duration.

    Args:
        path: Path of the YAML file.
        overrides: Overrides such as `seed=1`.

    Raises:
        ConfigError: The file is missing or is not valid YAML, or an override does not have the form
            `key=value`.
    """
    try:
        text = quote_text(Path(path).read_text(encoding="utf-8-sig"))
        config = OmegaConf.load(io.StringIO(text))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: the config must be a mapping of keys to values")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(
                f"{override!r}: an override must have the form key=value, such as seed=1"
            )
    _find_beside(config, os.path.dirname(path))
    pairs = [override.partition("=") for override in overrides]
    try:
        given = OmegaConf.from_dotlist([f"{k}={quote_text(v, k)}" for k, _, v in pairs])
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot apply the overrides: {_one_line(error)}") from error
    config = cast(DictConfig, OmegaConf.merge(config, given))
    # Ignore OmegaConf interpolations that cannot be resolved yet; `resolve` reports them later.
    recipe, duration = (
        OmegaConf.select(config, name, throw_on_resolution_failure=False)
        for name in ("recipe_name", "max_duration")
    )
    if recipe in RECIPES and duration is not None and "max_duration" in given:
        OmegaConf.update(config, f"{recipe}.max_duration", duration, force_add=True)
    for name in [key.removeprefix("loggers.") for key, _, text in pairs if text == "null"]:
        if isinstance(config.get("loggers"), DictConfig):
            # `loggers.NAME=null` on the command line removes the logger.
            config.loggers.pop(name, None)
    return config


def _find_beside(config: DictConfig, folder: str) -> None:
    """Look for input files in the YAML file's folder if they are not in the current folder."""
    for name in INPUT_PATHS:
        value = OmegaConf.select(config, name, throw_on_resolution_failure=False)
        if isinstance(value, str) and "://" not in value and not os.path.exists(value):
            beside = os.path.join(folder, value)
            if os.path.exists(beside):
                OmegaConf.update(config, name, beside)


@one_line_errors()
def resolve(config: DictConfig | dict[str, Any], with_data: bool = True) -> Config:
    """Check a config against the schema and return it as a `Config` with the recipe's duration.

    Args:
        config: Content of the YAML, as loaded by OmegaConf.
        with_data: Whether to check that the data and files named in the config exist on this
            machine.

    Raises:
        ConfigError: A key is unknown, has the wrong type, or has an invalid value.
    """
    raw = OmegaConf.to_container(OmegaConf.create(config), resolve=True, throw_on_missing=True)
    raw = _without_empty_sections(cast("dict[str, Any]", raw), Config(), "")
    merged = OmegaConf.merge(_schema(), raw)
    typed = cast(Config, OmegaConf.to_object(merged))
    for name, value in flatten(typed).items():
        if isinstance(value, str) and value.startswith("~"):
            _set(typed, name, os.path.expanduser(value))
        # As in MosaicML's code, a time without a unit is in epochs.
        elif time_pattern(name) and value is not None and value.isdigit():
            _set(typed, name, f"{value}ep")
    typed.run_name = typed.run_name or os.environ.get("RUN_NAME") or None
    if typed.save_folder and "{run_name}" in typed.save_folder:
        if not typed.run_name:
            raise ConfigError(
                "save_folder: the path contains {run_name}, but run_name is empty; set run_name"
            )
        typed.save_folder = typed.save_folder.replace("{run_name}", typed.run_name)
    # MosaicML's code saves one checkpoint per rank, but this project saves only that of rank 0, so
    # replace `{rank}` with 0.
    if typed.load_path:
        typed.load_path = typed.load_path.replace("{rank}", "0")
    if typed.model.backbone_weights == "none":
        typed.model.backbone_weights = None
    if typed.data is not None:
        _describe(typed, raw)
    if typed.recipe_name in (None, *RECIPES):
        typed.max_duration = typed.recipe.max_duration
    check(typed, with_data)
    # Convert the number of micro-batches to the size of a micro-batch.
    if isinstance(typed.grad_accum, int):
        size = -(-per_process(typed.train_dataset) // typed.grad_accum)
        typed.device_train_microbatch_size = max(1, size)
    elif typed.grad_accum == "auto":
        typed.device_train_microbatch_size = "auto"
    return typed


@functools.cache
def _schema() -> DictConfig:
    """Return the schema of all keys. It is cached, because it is slow to build."""
    return OmegaConf.structured(Config)


def _describe(config: Config, raw: dict[str, Any]) -> None:
    """Load the data set's description into the config and set the keys that depend on it."""
    # Import these modules only here: they load NumPy and OpenCV, which would slow down every start.
    from dataset.description import parse_description, read_description
    from segmentation.classes import rename_classes

    where = "data"
    if isinstance(config.data, str):
        where, config.data = config.data, read_description(config.data)
    if not isinstance(config.data, dict):
        raise ConfigError(
            f"data: {config.data!r} must be the path of a description file, or a mapping with a "
            "description's keys"
        )
    description = parse_description(config.data, where)
    count, given = len(description.classes), (raw.get("model") or {}).get("num_classes")
    if given not in (None, count):
        raise ConfigError(
            f"model.num_classes: {given} does not match the {count} classes in {where}; leave out "
            "the key"
        )
    config.model.num_classes = count
    if config.class_names is not None:
        rename_classes(config.class_names, count, description.classes, where)
    for name in ("train_dataset", "eval_dataset"):
        section = getattr(config, name)
        section.path = section.path or description.root
        if not section.ignore_background or section.ignore_label is not None:
            raise ConfigError(
                f"{name}: ignore_background and ignore_label apply only to ADE20K's layout; "
                f"list the ignored labels under ignore in {where}"
            )


def data_sources(config: Config) -> dict[str, DataSource]:
    """Return the training and validation sources; a folder that both use is listed only once."""
    from dataset.description import ade20k, parse_description
    from dataset.labels import Labels
    from dataset.source import DataSource, ShardOptions

    sources: dict[str, DataSource] = {}
    for split, dataset in (("train", config.train_dataset), ("val", config.eval_dataset)):
        if config.data is not None:
            description = parse_description(config.data)
        else:
            classes = config.model.num_classes
            description = ade20k(Labels(classes, dataset.ignore_background, dataset.ignore_label))
        options = {
            field.name: getattr(dataset, field.name) for field in dataclasses.fields(ShardOptions)
        }
        shards = ShardOptions(**options) if dataset.is_streaming else None
        sources[split] = DataSource(str(dataset.path), split, description, shards)
    if sources["train"].of_split("val") == sources["val"]:
        sources["val"] = sources["train"].of_split("val")
    return sources


def class_infos(config: Config) -> list[ClassInfo]:
    """Return the names and colours of a run's classes.

    Raises:
        ClassError: The file given by `class_names` cannot be read or has the wrong number of names.
    """
    from dataset.description import parse_description
    from segmentation.classes import load_classes

    if config.data is not None and config.class_names is None:
        return list(parse_description(config.data).classes)
    return load_classes(config.class_names, config.model.num_classes)


def network_label(config: Config) -> str:
    """Return a readable name for a run's network, such as `DeepLabV3+ on resnet101`."""
    model = config.model
    if model.name != "deeplabv3":
        return model.name
    return f"DeepLabV3{'+' if model.use_plus else ''} on {model.backbone_arch}"


def read_command_line(arguments: list[str]) -> Config | None:
    """Return the config for a command line of main.py, or None if `--plan` is given.

    Args:
        arguments: Path of the YAML file, followed by overrides such as `seed=1`.

    Raises:
        SystemExit: The command line asks for help, or its config is invalid. The help text or the
            error has already been printed.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        raise SystemExit(0 if arguments else 2)
    if "--plan" in arguments:
        return None
    end_with_launcher()
    # torchrun's first attempt has already printed the error, so exit silently.
    if was_refused():
        raise SystemExit(2)
    try:
        config = resolve(load(arguments[0], arguments[1:]))
        check_evaluates(config)
    except ConfigError as error:
        wait_for_nodes(error)
        is_first = is_first_to_refuse(str(error))
        if is_first or (is_first is None and os.environ.get("LOCAL_RANK", "0") == "0"):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    return config


def _set(config: Config, name: str, value: Any) -> None:
    section, _, leaf = name.rpartition(".")
    setattr(lookup(config, section) if section else config, leaf, value)


def _without_empty_sections(raw: dict[str, Any], defaults: Any, prefix: str) -> dict[str, Any]:
    """Reject unknown keys, and drop empty sections so that their defaults apply."""
    known_hints = get_type_hints(type(defaults))
    hints = {field.name: known_hints[field.name] for field, _ in fields_of(defaults)}
    result = {}
    for name, value in raw.items():
        key = f"{prefix}{name}"
        if name not in hints:
            # A saved config lists a recipe's unused algorithms as empty sections, such as SAM for
            # `mild`. Skip them.
            if name in known_hints and value is None:
                continue
            is_eval = isinstance(defaults, EvalDatasetConfig)
            if is_eval and name in get_type_hints(TrainDatasetConfig):
                raise ConfigError(f"{key}: only train_dataset has this key; leave it out")
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown key {key}; {known}")
        section, default = hints[name], getattr(defaults, name)
        if dataclasses.is_dataclass(default) or name == "loggers":
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{key}: got {value!r}; expected a section of keys")
            # As in MosaicML's YAML files, an empty section enables a logger with its default
            # arguments.
            if name == "loggers":
                value = {logger: {} if given is None else given for logger, given in value.items()}
            if dataclasses.is_dataclass(default):
                value = _without_empty_sections(value, default, f"{key}.")
        elif value is None:
            if section is not Any and type(None) not in get_args(section):
                raise ConfigError(f"{key} is empty; give a value or remove the key")
        else:
            kinds = {get_origin(part) for part in (section, *get_args(section))}
            if list in kinds and not isinstance(value, list):
                raise ConfigError(f"{key}: got {value!r}; expected a list, such as [{value}]")
            if dict in kinds and not isinstance(value, dict):
                raise ConfigError(f"{key}: got {value!r}; expected a mapping, such as {{a: 1}}")
        result[name] = value
    return result


def help_text() -> str:
    """Return the help text, which lists each YAML key with its default and meaning."""
    lines = [
        "usage: composer main.py CONFIG [key=value ...] [--plan]\n",
        "keys of CONFIG, defaults, meanings:",
    ]
    for name, field, default in keys_of(Config()):
        shown = "(empty)" if default in (None, [], {}) else str(default)
        if isinstance(default, bool):
            shown = shown.lower()
        lines.append(f"  {name:<39} {shown:<14} {field.metadata['meaning']}")
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1] if isinstance(error, OmegaConfBaseException) else lines)
