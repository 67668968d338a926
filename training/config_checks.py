"""Checks of config values that go beyond type checks."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import os
import re
from typing import Any

from dataset.paths import ADE20K, FOLDERS, find_root
from errors import ConfigError, UnevenBatch
from files import is_remote
from training.keys import flatten, keys_of
from training.recipes import RECIPES
from training.schema import (
    LIBRARIES,
    LOGGERS,
    PRECISIONS,
    SCHEDULES,
    Config,
    DatasetConfig,
    ModelConfig,
)

# Longest image side, in pixels, that OpenCV can resize.
MAX_RESIZED = 32767
# Patterns that time values must match, indexed by the last part of the config key.
DURATION, INTERVAL = r"[1-9]\d*(ep|ba|sp)", r"[1-9]\d*(ep|ba)"
TIMES = {
    "max_duration": DURATION,
    "freeze_backbone": DURATION,
    "eval_interval": INTERVAL,
    "save_interval": INTERVAL,
    "stop_after": INTERVAL,
    "half_life": INTERVAL,
    "update_interval": INTERVAL,
    "warmup": rf"0(ep|ba)|{INTERVAL}",
}
# Keys that take either a number or `auto`.
AUTO = (
    "device_train_microbatch_size",
    "grad_accum",
    "train_dataset.num_workers",
    "eval_dataset.num_workers",
)
# Keys that need another key, and the value that the other key must have. None means any value.
NEEDS: tuple[tuple[str, str, Any], ...] = (
    ("autoresume", "save_folder", None),
    ("autoresume", "run_name", None),
    ("save_best", "save_folder", None),
    ("best_metric", "save_folder", None),
    ("stop_after", "save_folder", None),
    ("class_table_csv", "save_folder", None),
    ("activation_memory_budget", "compile", None),
    ("load_weights_only", "load_path", None),
    ("load_least", "load_path", None),
    ("load_classes_by_name", "load_weights_only", True),
    ("optimizer.momentum", "optimizer.name", "sgdw"),
    ("optimizer.betas", "optimizer.name", "adamw"),
    ("schedule.power", "schedule.name", "poly"),
)


def check(config: Config, with_data: bool = True) -> None:
    """Reject values that have the right type but are not valid.

    Args:
        config: Config to check.
        with_data: Whether to check that the data, the checkpoint and the loggers' packages exist on
            this machine, and that the batches divide evenly among the ranks.

    Raises:
        ConfigError: A value is invalid; the message names the key and its valid values.
    """
    _check_choices(config)
    _check_loggers(config, with_data)
    _check_names(config)
    path = config.load_path if with_data else None
    if path and not is_remote(path) and not any(map(os.path.exists, (path, f"{path}.symlink"))):
        raise ConfigError(f"load_path: cannot find {_seen_from(path)}")
    keep = config.save_num_checkpoints_to_keep
    if keep == 0 or keep < -1:
        raise ConfigError(f"save_num_checkpoints_to_keep: {keep} must be 1 or more, or -1 for all")
    _check_network(config.model)
    _check_numbers(config)
    if config.model.cross_entropy_weight + config.model.dice_weight == 0:
        raise ConfigError(
            "model.cross_entropy_weight and model.dice_weight are both 0, so there is no loss; "
            "raise one of them"
        )
    _check_class_weights(config.model.class_weights, config.model.num_classes)
    _check_times(config)
    _check_optimizer(config)
    _check_batch_sizes(config, world_size() if with_data else 1)
    _check_needs(config)
    named = config.class_names or config.data or config.model.num_classes >= 150
    if config.load_classes_by_name and not named:
        raise ConfigError("load_classes_by_name: the run's classes have no names; set class_names")
    if config.is_train:
        _check_same_labels(config)
    used = [("eval_dataset", "val")] + [("train_dataset", "train")] * config.is_train
    for name, split in used:
        _check_dataset(getattr(config, name), name)
        if with_data:
            _check_path(getattr(config, name), name, split, config.data is not None)


def _check_choices(config: Config) -> None:
    """Reject unknown values for keys that allow only certain values."""
    levels = ("debug", "info", "warning", "error", "critical")
    choices: tuple[tuple[str, Any, tuple], ...] = (
        ("recipe_name", config.recipe_name, (None, *RECIPES)),
        ("precision", config.precision, PRECISIONS),
        ("compile", config.compile, ("auto", True, False)),
        ("model.fused_loss", config.model.fused_loss, ("auto", False)),
        ("optimizer.name", config.optimizer.name, ("sgdw", "adamw")),
        ("schedule.name", config.schedule.name, (None, *SCHEDULES)),
        ("python_log_level", (config.python_log_level or "warning").lower(), levels),
    )
    for name, value, known in choices:
        if value not in known:
            shown = [str(one).lower() for one in known if one is not None]
            raise ConfigError(
                f"{name}: {value} is unknown; use {', '.join(shown[:-1])} or {shown[-1]}"
            )
    for name in AUTO:
        value = lookup(config, name)
        if isinstance(value, str) and value != "auto":
            raise ConfigError(f"{name}: {value!r} must be a number or auto")


def _check_loggers(config: Config, with_data: bool) -> None:
    for name, arguments in config.loggers.items():
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"loggers.{name}: no logger has this name; did you mean {near}?")
        if not isinstance(arguments, dict):
            raise ConfigError(
                f"loggers.{name}: {arguments!r} must be a mapping of arguments, or {{}} for none"
            )
        if with_data and (package := LOGGERS[name]) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"loggers.{name}: a package is missing; run make install WITH={name}")


def _check_names(config: Config) -> None:
    """Check the name of the run, and that the file with the class names exists."""
    name = config.run_name
    if name and (name in (".", "..") or re.search(r"[/\0\n]", name)):
        raise ConfigError(
            f"run_name: {name!r} is not a valid folder name; choose a name without slashes or line "
            "breaks"
        )
    if config.class_names is not None and not os.path.isfile(config.class_names):
        raise ConfigError(f"class_names: cannot find {_seen_from(config.class_names)}")


def _check_needs(config: Config) -> None:
    """Reject keys that have no effect because another key is missing or has a different value."""
    defaults = Config()
    for name, other, wanted in NEEDS:
        if lookup(config, name) == lookup(defaults, name):
            continue
        value = lookup(config, other)
        is_met = bool(value) if wanted is None else value == wanted
        if not is_met:
            needed = other if wanted is None else f"{other}={str(wanted).lower()}"
            raise ConfigError(
                f"{name} has no effect without {needed}; set {other}, or leave out {name}"
            )


def check_evaluates(config: Config) -> None:
    """Reject an evaluation without a checkpoint; only `--plan` accepts one.

    Raises:
        ConfigError: No checkpoint is given, so the evaluation would score random weights.
    """
    if not (config.is_train or config.load_path or config.autoresume):
        raise ConfigError("is_train=false: an evaluation needs a checkpoint; set load_path")


def _check_network(model: ModelConfig) -> None:
    if model.name == "deeplabv3":
        if model.arguments:
            raise ConfigError(
                "model.arguments: deeplabv3 does not use this key; set its own keys directly under "
                "model"
            )
        return
    kind, _, name = model.name.partition(":")
    is_function = re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", model.name)
    if not name or not (kind in LIBRARIES or is_function):
        raise ConfigError(
            f"model.name: {model.name} is unknown; use deeplabv3, LIBRARY:NAME with one of "
            f"the libraries {', '.join(LIBRARIES)}, or a function such as "
            "package.module:function"
        )
    package = LIBRARIES.get(kind)
    if package and importlib.util.find_spec(package) is None:
        raise ConfigError(f"model.name: {kind} needs {package}; run make install WITH={kind}")
    weights = model.backbone_weights or ""
    if "/" in weights:
        raise ConfigError(
            f"model.backbone_weights: a path works only for deeplabv3; for {model.name}, "
            f"set load_path={weights} and load_weights_only=true"
        )


def _check_numbers(config: Config) -> None:
    """Check that all numbers are within the bounds that the schema defines."""
    for name, field, value in keys_of(config):
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int | float) and not isinstance(number, bool):
                _check_number(number, name, field.metadata["bounds"])


def _check_number(number: float, name: str, bounds: str) -> None:
    first, last = bounds[1:-1].split(", ")
    low, high = float(first), float(last)
    from_low = number > low if bounds[0] == "(" else number >= low  # NaN fails this comparison.
    to_high = number < high if bounds[-1] == ")" else number <= high
    if from_low and to_high and math.isfinite(number):
        return
    lowest = f"{'more than' if bounds[0] == '(' else 'at least'} {first}"
    highest = f"{'less than' if bounds[-1] == ')' else 'at most'} {last}"
    if low == -math.inf:
        wanted = "a finite number"
    elif high == math.inf:
        wanted = f"a finite number, {lowest}"
    elif bounds[0] == "[" and bounds[-1] == "]":
        wanted = f"{first} to {last}"
    else:
        wanted = f"{lowest} and {highest}"
    raise ConfigError(f"{name}: {number} is out of range; use {wanted}")


def _check_optimizer(config: Config) -> None:
    optimizer, schedule = config.optimizer, config.schedule
    if len(optimizer.betas) != 2:
        raise ConfigError(f"optimizer.betas: {optimizer.betas} must be a list of two numbers")
    if optimizer.name == "adamw" and optimizer.lr > 0.01:
        raise ConfigError(f"optimizer.lr: {optimizer.lr} is too large for adamw; try 1e-4")
    if unknown := set(optimizer.no_decay) - {"norm", "bias"}:
        raise ConfigError(f"optimizer.no_decay: {', '.join(unknown)} is unknown; use norm or bias")
    if schedule.final and schedule.name == "constant":
        raise ConfigError("schedule.final: a constant schedule has no final value; remove this key")
    if config.max_duration.endswith("sp") and not schedule.warmup.startswith("0"):
        raise ConfigError("schedule.warmup: a warm-up needs max_duration in ep or ba, not in sp")


def _check_class_weights(given: Any, num_classes: int) -> None:
    if given is None or given == "auto":
        return
    weights = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(weights, list):
        raise ConfigError(
            f"model.class_weights: {given!r} must be auto, a list, or {{name: weight}}"
        )
    for weight in weights:
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"model.class_weights: {weight!r} must be a finite number of at least 0"
            )
    if isinstance(given, list) and len(weights) != num_classes:
        raise ConfigError(
            f"model.class_weights: got {len(weights)} weights for {num_classes} classes; "
            "give one weight per class"
        )
    if isinstance(given, list) and not sum(weights):
        raise ConfigError("model.class_weights: all weights are 0; set at least one above 0")


def time_pattern(name: str) -> str | None:
    """Return the pattern for the value of a key that holds a time, or None for any other key."""
    return TIMES.get(name.rpartition(".")[2])


def _check_times(config: Config) -> None:
    for name, text in flatten(config).items():
        pattern = time_pattern(name)
        if pattern and text is not None and not re.fullmatch(pattern, text):
            raise ConfigError(
                f"{name}: {text!r} is not a time; write a number and a unit, such as 25ep or 1000ba"
            )
    ema = config.recipe.ema
    if ema is not None and ema.half_life[-2:] != ema.update_interval[-2:]:
        raise ConfigError(
            f"{config.recipe_name}.ema: half_life ({ema.half_life}) and update_interval "
            f"({ema.update_interval}) must have the same unit; use ep or ba for both"
        )


def _check_batch_sizes(config: Config, processes: int) -> None:
    for name in ("train_dataset", "eval_dataset"):
        batch_size = getattr(config, name).batch_size
        if batch_size % processes and (config.is_train or name == "eval_dataset"):
            raise UnevenBatch(
                f"{name}.batch_size: {batch_size} images do not divide evenly among "
                f"{processes} processes; use {max(batch_size // processes, 1) * processes}"
            )


def _check_same_labels(config: Config) -> None:
    """Reject a config that interprets a label differently in training and validation masks."""
    train, val = config.train_dataset, config.eval_dataset
    ways = [(section.ignore_background, _extra_ignored(section)) for section in (train, val)]
    for key, of_train, of_val in zip(("ignore_background", "ignore_label"), *ways):
        if of_train != of_val:
            shown = [str(getattr(section, key)).lower() for section in (train, val)]
            raise ConfigError(
                f"train_dataset.{key} is {shown[0]}, but eval_dataset.{key} is {shown[1]}; "
                "set both to the same value, because both splits share their labels"
            )


def _extra_ignored(dataset: DatasetConfig) -> int | None:
    """Return the label that is ignored only because of `ignore_label`, or None."""
    known = (255, 0) if dataset.ignore_background else (255,)
    return None if dataset.ignore_label in known else dataset.ignore_label


def _check_dataset(dataset: DatasetConfig, name: str) -> None:
    if dataset.min_resize_scale > dataset.max_resize_scale:
        raise ConfigError(
            f"{name}.min_resize_scale: {dataset.min_resize_scale} is above max_resize_scale "
            f"({dataset.max_resize_scale}); lower it"
        )
    largest = dataset.base_size * dataset.max_resize_scale
    if largest > MAX_RESIZED:
        raise ConfigError(
            f"{name}: base_size times max_resize_scale is {largest:.0f} pixels, but the limit "
            f"is {MAX_RESIZED}; lower base_size or max_resize_scale"
        )
    workers = dataset.num_workers
    if isinstance(workers, int) and workers > (most := 16 * (os.cpu_count() or 1)):
        raise ConfigError(f"{name}.num_workers: {workers} is too many; use at most {most}")
    limit = dataset.cache_limit
    if limit is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[kmgtp]?b?", limit.lower()):
        raise ConfigError(f"{name}.cache_limit: {limit!r} is not a size; use a value such as 100gb")
    # Each pixel takes 4 bytes: 3 for the 8-bit RGB image and 1 for the mask.
    batch = dataset.batch_size // world_size() * dataset.final_size**2 * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if batch * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > memory / 4:
        raise ConfigError(
            f"{name}: with {dataset.batch_size} images of {dataset.final_size} pixels, each "
            f"process needs {batch / 2**30:.1f} GB per batch, which is too much for this machine's "
            "memory; lower batch_size or final_size"
        )


def _check_path(dataset: DatasetConfig, name: str, split: str, described: bool) -> None:
    if not dataset.path:
        raise ConfigError(f"{name}.path is empty; set it to the folder or bucket with the data")
    if is_remote(dataset.path):
        if not dataset.is_streaming:
            raise ConfigError(f"{name}.path is remote; set {name}.is_streaming=true for MDS shards")
        if not dataset.local:
            raise ConfigError(f"{name}.local is empty; set it to a cache folder for the shards")
    elif not os.path.isdir(dataset.path):
        raise ConfigError(f"{name}.path: cannot find the folder {_seen_from(dataset.path)}")
    elif not dataset.is_streaming and not described:
        images = f"images/{FOLDERS[split]}"
        if not (find_root(dataset.path) / images).is_dir():
            raise ConfigError(
                f"{name}.path: {dataset.path} does not contain {ADE20K}/{images}; check the path"
            )


def _seen_from(path: str) -> str:
    """Describe a missing path and the folders that were searched for it."""
    if os.path.isabs(path):
        return f"{path}; check the path"
    return f"{path}, relative to {os.getcwd()} or to the YAML's folder; check the path"


def per_process(dataset: DatasetConfig) -> int:
    """Return the number of images that each rank processes per batch."""
    return dataset.batch_size // world_size()


def world_size() -> int:
    """Return the number of ranks, as set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def lookup(config: Config, name: str) -> Any:
    """Return the value of a key such as `optimizer.lr`."""
    return functools.reduce(getattr, name.split("."), config)
