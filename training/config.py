"""The typed schema of the YAML: every key, its default and what it means; loading and checking.

    config = load("yamls/deeplabv3.yaml", ["recipe_name=mild"])  # what the command line does
    config = resolve(config)  # what main(config) does

Nothing here imports torch: a wrong config is answered before anything slow begins.
"""

# ruff: noqa: RUF009 (key() makes a dataclasses.field)

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import itertools
import os
import re
from dataclasses import dataclass
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dataset.folders import ADE20K, FOLDERS, find_root
from errors import ConfigError

RECIPES = ("mild", "medium", "hot")
# Composer's loggers, and the package that each needs besides (an extra of Composer's of that name).
LOGGERS = {
    "progress_bar": None,
    "console": None,
    "file": None,
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "neptune": "neptune",
}
PRECISIONS = ("auto", "fp32", "amp_bf16", "amp_fp16")


def key(default: Any, meaning: str) -> Any:
    """Return a config key: its default and the line that `main.py --help` prints for it."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"meaning": meaning})
    return dataclasses.field(default=default, metadata={"meaning": meaning})


@dataclass
class ModelConfig:
    """The network and its loss."""

    num_classes: int = key(150, "number of classes")
    backbone_arch: str = key("resnet101", "torchvision ResNet with bottleneck blocks")
    backbone_weights: str | None = key(
        "IMAGENET1K_V2", "IMAGENET1K_V1, IMAGENET1K_V2, a path or URL, or none (empty)"
    )
    sync_bn: bool = key(True, "share BatchNorm statistics between the processes of a node")
    use_plus: bool = key(True, "DeepLabV3+ rather than DeepLabV3")
    cross_entropy_weight: float = key(0.375, "weight of the cross entropy in the loss")
    dice_weight: float = key(1.125, "weight of the Dice loss in the loss")


@dataclass
class DatasetConfig:
    """A data set, and how its samples are made."""

    is_streaming: bool = key(False, "MDS shards (Streaming) rather than folders")
    path: str | None = key(
        None, "folder that holds ADEChallengeData2016, or where the shards are (folder, s3://...)"
    )
    local: str | None = key(None, "streaming: local folder that caches the shards")
    base_size: int = key(512, "length of the shorter side before the random resize, pixels")
    min_resize_scale: float = key(0.5, "smallest random resize factor")
    max_resize_scale: float = key(2.0, "largest random resize factor")
    final_size: int = key(512, "side of the square that the network gets, pixels")
    ignore_background: bool = key(True, "label 0 is ignored and label k is class k - 1")
    ignore_label: int | None = key(None, "a further label value to ignore")
    batch_size: int = key(128, "images a step, over all GPUs")
    drop_last: bool = key(True, "leave out an epoch's last incomplete batch")
    num_workers: int | str = key("auto", "loader processes per GPU; auto fits the machine")
    cache_limit: str | None = key(None, "streaming: most the cache may take, as in 100gb")
    shuffle_seed: int | None = key(None, "seed of the order of samples; empty: the run's seed")
    predownload: int | None = key(None, "streaming: samples to download ahead")
    download_retry: int = key(6, "streaming: times to retry a failed download")
    download_timeout: float = key(60.0, "streaming: seconds to wait for a shard")
    validate_hash: str | None = key("auto", "streaming: verify shards: auto, or a hash as sha1")


@dataclass
class EvalDatasetConfig(DatasetConfig):
    """The data set of evaluation."""

    drop_last: bool = key(False, "kept for the reference's files; every sample is scored once")


@dataclass
class OptimizerConfig:
    """SGD with decoupled weight decay."""

    lr: float = key(0.08, "learning rate (DecoupledSGDW)")
    momentum: float = key(0.9, "momentum")
    weight_decay: float = key(5.0e-5, "decoupled weight decay, a fraction per step")


@dataclass
class EMAConfig:
    """The moving average of the weights."""

    half_life: str = key("1000ba", "half-life of the averaged weights")
    update_interval: str = key("10ba", "time between updates of the average")


@dataclass
class SAMConfig:
    """Sharpness-aware minimisation."""

    rho: float = key(0.3, "radius of the neighbourhood (sharpness-aware minimisation)")
    interval: int = key(2, "steps between two sharpness-aware ones")


@dataclass
class MixUpConfig:
    """Blending photos in pairs."""

    alpha: float = key(0.2, "the mixing coefficient is drawn from Beta(alpha, alpha)")


@dataclass
class HotEMAConfig(EMAConfig):
    """The hot recipe's."""

    half_life: str = key("2000ba", "half-life of the averaged weights")
    update_interval: str = key("1ba", "time between updates of the average")


@dataclass
class HotSAMConfig(SAMConfig):
    """The hot recipe's."""

    interval: int = key(1, "steps between two sharpness-aware ones")


@dataclass
class HotMixUpConfig(MixUpConfig):
    """The hot recipe's."""

    alpha: float = key(0.5, "the mixing coefficient is drawn from Beta(alpha, alpha)")


@dataclass
class MildConfig:
    """The recipe for short runs."""

    max_duration: str = key("25ep", "duration of the mild recipe")
    ema: EMAConfig = key(EMAConfig, "")


@dataclass
class MediumConfig:
    """The recipe for longer runs."""

    max_duration: str = key("90ep", "duration of the medium recipe")
    ema: EMAConfig = key(EMAConfig, "")
    sam: SAMConfig = key(SAMConfig, "")
    mixup: MixUpConfig = key(MixUpConfig, "")


@dataclass
class HotConfig:
    """The recipe for the longest runs."""

    max_duration: str = key("240ep", "duration of the hot recipe")
    ema: HotEMAConfig = key(HotEMAConfig, "")
    sam: HotSAMConfig = key(HotSAMConfig, "")
    mixup: HotMixUpConfig = key(HotMixUpConfig, "")


@dataclass
class Config:
    """The whole YAML."""

    run_name: str | None = key(None, "name of the run; empty: $RUN_NAME, else made up")
    is_train: bool = key(True, "train; false: evaluate once")
    seed: int = key(17, "seed of the weights, the order of the data and the augmentation")
    max_duration: str = key("128ep", "duration without a recipe, as in 128ep or 20000ba")
    recipe_name: str | None = key(None, "mild, medium or hot; empty: the plain baseline")
    device_train_microbatch_size: int | str | None = key(
        "auto", "images a GPU takes at once; auto: as many as fit its memory; empty: all"
    )
    grad_accum: int | str | None = key(
        None, "older name: parts that a GPU takes its images in, auto or a number"
    )
    precision: str = key("auto", "auto, fp32, amp_bf16 or amp_fp16")
    compile: bool | str = key("auto", "torch.compile the model; auto: on a GPU")
    deterministic: bool = key(False, "the same bits in every run on a GPU too, but slower")
    model: ModelConfig = key(ModelConfig, "")
    train_dataset: DatasetConfig = key(DatasetConfig, "")
    eval_dataset: EvalDatasetConfig = key(EvalDatasetConfig, "")
    eval_interval: str = key("1ep", "time between evaluations")
    eval_first: bool = key(False, "also evaluate before the first step")
    train_metrics_interval: int = key(0, "batches between two scores of a training batch; 0: never")
    pictures: int = key(4, "validation photos to draw at each evaluation; 0: none")
    class_table_csv: bool = key(False, "write each evaluation's class table below save_folder")
    class_names: str | None = key(None, "file with a class name a line; empty: ADE20K's if 150")
    optimizer: OptimizerConfig = key(OptimizerConfig, "")
    mild: MildConfig = key(MildConfig, "")
    medium: MediumConfig = key(MediumConfig, "")
    hot: HotConfig = key(HotConfig, "")
    loggers: dict[str, Any] = key(dict, f"any of {', '.join(LOGGERS)}, each with its arguments")
    save_folder: str | None = key(None, "where checkpoints go: a folder or s3://...")
    save_interval: str = key("1ep", "time between checkpoints")
    save_num_checkpoints_to_keep: int = key(1, "newest checkpoints to keep; -1: all")
    save_overwrite: bool = key(False, "replace what an earlier run left in save_folder")
    load_path: str | None = key(None, "checkpoint to begin from, or to evaluate")
    load_weights_only: bool = key(False, "take only the weights from load_path, and start anew")
    autoresume: bool = key(False, "go on from the newest whole checkpoint in save_folder, if any")
    python_log_level: str | None = key("warning", "debug, info, warning or error")


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a YAML and apply `key=value` overrides; a duration given there beats the recipe's.

    Raises:
        ConfigError: The file is missing or not YAML, or an override is not `key=value`.
    """
    try:
        config = OmegaConf.load(path)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {_one_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"the config {path} is not a mapping of keys to values")
    for override in overrides:
        if "=" not in override.lstrip("="):
            raise ConfigError(f"{override!r} is not an override; write key=value, as in seed=1")
    try:
        given = OmegaConf.from_dotlist(overrides)
        config = cast(DictConfig, OmegaConf.merge(config, given))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"cannot apply the overrides: {_one_line(error)}") from error
    recipe = config.get("recipe_name")
    if recipe in RECIPES and given.get("max_duration") is not None:
        OmegaConf.update(config, f"{recipe}.max_duration", given.max_duration, force_add=True)
    return config


def resolve(config: DictConfig | dict[str, Any]) -> Config:
    """Check a config against the schema and make it a `Config`, with the recipe's duration.

    Raises:
        ConfigError: An unknown key, a value of the wrong type, or one that cannot work.
    """
    try:
        raw = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    raw = _without_empty_sections(cast("dict[str, Any]", raw), Config, "")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
        typed = cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {_one_line(error)}") from error
    typed.run_name = typed.run_name or os.environ.get("RUN_NAME") or None
    if typed.save_folder and "{run_name}" in typed.save_folder:
        if not typed.run_name:
            raise ConfigError("save_folder holds {run_name}, but run_name is empty")
        typed.save_folder = typed.save_folder.replace("{run_name}", typed.run_name)
    typed.loggers = {name: given for name, given in typed.loggers.items() if given is not None}
    if typed.load_path:  # the reference's files have one checkpoint a rank, these have one in all
        typed.load_path = typed.load_path.replace("{rank}", "0")
    if typed.model.backbone_weights == "none":
        typed.model.backbone_weights = None
    if typed.grad_accum is not None:
        typed.device_train_microbatch_size = _microbatch_size(typed)
    if typed.recipe_name in RECIPES:
        typed.max_duration = getattr(typed, typed.recipe_name).max_duration
    _normalise_times(typed)
    _check(typed)
    return typed


def _microbatch_size(config: Config) -> int | str:
    """Return the `device_train_microbatch_size` that `grad_accum` stands for."""
    parts = config.grad_accum
    if parts == "auto":
        return "auto"
    if not isinstance(parts, int) or parts < 1:
        raise ConfigError(f"grad_accum: {parts!r} is neither 1 or more nor auto")
    per_process = config.train_dataset.batch_size // _world_size()
    return max(1, -(-per_process // parts))


def _world_size() -> int:
    """Return the number of processes, as the launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _lookup(config: Config, name: str) -> Any:
    """Return the value of a key such as optimizer.lr."""
    return functools.reduce(getattr, name.split("."), config)


def _without_empty_sections(raw: dict[str, Any], schema: type, prefix: str) -> dict[str, Any]:
    """Refuse unknown keys, and drop sections left empty, which mean their defaults."""
    hints = get_type_hints(schema)
    result = {}
    for name, value in raw.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=1, cutoff=0.5)
            known = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(hints)}"
            raise ConfigError(f"unknown key {prefix}{name}; {known}")
        section = hints[name]
        if dataclasses.is_dataclass(section) or name == "loggers":
            if value is None:
                continue
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{name}: {value!r} is not a section of keys")
            if dataclasses.is_dataclass(section):
                value = _without_empty_sections(value, cast(type, section), f"{prefix}{name}.")
        elif value is None and type(None) not in getattr(section, "__args__", ()):
            raise ConfigError(f"{prefix}{name} is empty; give a value or leave out the key")
        result[name] = value
    return result


def _check(config: Config) -> None:
    """Refuse values of the right type that cannot work."""
    if config.recipe_name is not None and config.recipe_name not in RECIPES:
        raise ConfigError(f"recipe_name: {config.recipe_name} is none of {', '.join(RECIPES)}")
    for name, arguments in config.loggers.items():
        if name not in LOGGERS:
            near = difflib.get_close_matches(name, LOGGERS, n=1, cutoff=0.0)[0]
            raise ConfigError(f"loggers.{name}: no such logger; did you mean {near}?")
        if not isinstance(arguments, dict):
            raise ConfigError(f"loggers.{name}: {arguments!r} is not its arguments; {{}} is none")
        if LOGGERS[name] and importlib.util.find_spec(LOGGERS[name]) is None:
            raise ConfigError(f"loggers.{name}: its package is missing; make install WITH={name}")
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision: {config.precision} is none of {', '.join(PRECISIONS)}")
    if config.compile not in ("auto", True, False):
        raise ConfigError(f"compile: {config.compile} is none of auto, true, false")
    if config.class_names is not None and not os.path.isfile(config.class_names):
        raise ConfigError(f"class_names: no file {config.class_names}")
    log_level = (config.python_log_level or "warning").lower()
    if log_level not in ("debug", "info", "warning", "error", "critical"):
        raise ConfigError(f"python_log_level: {log_level} is none of debug, info, warning, error")
    if config.autoresume and not config.save_folder:
        raise ConfigError("autoresume needs save_folder, where it looks for the newest checkpoint")
    if config.autoresume and not config.run_name:
        raise ConfigError("autoresume needs run_name, by which it knows its own checkpoints")
    if config.load_path and "://" not in config.load_path and not os.path.isfile(config.load_path):
        raise ConfigError(f"load_path: no file {config.load_path}")
    keep = config.save_num_checkpoints_to_keep
    if keep == 0 or keep < -1:
        raise ConfigError(
            f"save_num_checkpoints_to_keep: {keep} is neither 1 or more nor -1, which keeps all"
        )
    _check_numbers(config)
    _check_times(config)
    _check_batch_sizes(config)
    _check_dataset(config.eval_dataset, "eval_dataset", "val")
    if config.is_train:
        _check_dataset(config.train_dataset, "train_dataset", "train")


def _check_numbers(config: Config) -> None:
    positive = ["optimizer.lr"]
    non_negative = ["optimizer.weight_decay", "train_metrics_interval", "pictures"]
    non_negative += [
        "seed",
        "optimizer.momentum",
        "model.cross_entropy_weight",
        "model.dice_weight",
    ]
    for section in ("train_dataset", "eval_dataset"):
        names = ("base_size", "final_size", "min_resize_scale", "max_resize_scale", "batch_size")
        positive += [f"{section}.{name}" for name in names]
    if config.recipe_name in ("medium", "hot"):
        positive += [f"{config.recipe_name}.sam.rho", f"{config.recipe_name}.sam.interval"]
        non_negative.append(f"{config.recipe_name}.mixup.alpha")
    for name in positive + non_negative:
        value = _lookup(config, name)
        # not (a > b), rather than a <= b, so that NaN is refused as well
        if not (value > 0 or (value == 0 and name in non_negative)) or value == float("inf"):
            bound = "0 or more" if name in non_negative else "more than 0"
            raise ConfigError(f"{name}: {value} is not a finite number of {bound}")
    if config.optimizer.momentum >= 1:
        raise ConfigError(f"optimizer.momentum: {config.optimizer.momentum} is not below 1")
    if config.model.cross_entropy_weight + config.model.dice_weight == 0:
        raise ConfigError(
            "model.cross_entropy_weight and model.dice_weight are both 0: no loss is left"
        )
    if not 2 <= config.model.num_classes <= 253:
        raise ConfigError(
            f"model.num_classes: {config.model.num_classes} is not 2 to 253, as 8-bit masks hold"
        )


def _times(config: Config) -> tuple[list[str], list[str]]:
    """Return the keys that are durations, and those that are intervals."""
    durations, intervals = ["max_duration"], ["eval_interval", "save_interval"]
    if config.recipe_name in RECIPES:
        durations.append(f"{config.recipe_name}.max_duration")
        names = ("half_life", "update_interval")
        intervals += [f"{config.recipe_name}.ema.{name}" for name in names]
    return durations, intervals


def _normalise_times(config: Config) -> None:
    """Make a plain number a number of epochs, as in the reference."""
    for name in itertools.chain(*_times(config)):
        section, _, leaf = name.rpartition(".")
        parent = _lookup(config, section) if section else config
        text = str(getattr(parent, leaf))
        setattr(parent, leaf, f"{text}ep" if text.isdigit() else text)


def _check_times(config: Config) -> None:
    durations, intervals = _times(config)
    for name in durations + intervals:
        text = _lookup(config, name)
        units = "ep|ba|sp" if name in durations else "ep|ba"
        if not re.fullmatch(rf"[1-9]\d*({units})", text):
            raise ConfigError(
                f"{name}: {text!r} is not a time; write a number and a unit, as in 25ep or 1000ba"
            )
    if config.recipe_name is not None:
        ema = getattr(config, config.recipe_name).ema
        if ema.half_life[-2:] != ema.update_interval[-2:]:
            raise ConfigError(
                f"{config.recipe_name}.ema: half_life ({ema.half_life}) and update_interval "
                f"({ema.update_interval}) must have the same unit"
            )


def _check_batch_sizes(config: Config) -> None:
    world_size = _world_size()
    for name in ("train_dataset", "eval_dataset"):
        batch_size = getattr(config, name).batch_size
        if batch_size % world_size and (config.is_train or name == "eval_dataset"):
            raise ConfigError(
                f"{name}.batch_size: {batch_size} images do not divide among "
                f"{world_size} processes; use {max(batch_size // world_size, 1) * world_size}"
            )
    micro = config.device_train_microbatch_size
    if isinstance(micro, str) and micro != "auto":
        raise ConfigError(f"device_train_microbatch_size: {micro!r} is neither a number nor auto")
    if isinstance(micro, int) and micro < 1:
        raise ConfigError(f"device_train_microbatch_size: {micro} is not 1 or more")
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not config.is_train or (config.model.sync_bn and per_node > 1):
        return
    per_process = config.train_dataset.batch_size // world_size
    micro = min(micro, per_process) if isinstance(micro, int) else per_process
    if micro == 1 or per_process % micro == 1:
        raise ConfigError(
            f"train_dataset.batch_size: {per_process} images a process in micro-batches of {micro} "
            "leave one image alone, which BatchNorm after global pooling cannot normalise"
        )


def _check_dataset(dataset: DatasetConfig, name: str, split: str) -> None:
    if dataset.min_resize_scale > dataset.max_resize_scale:
        raise ConfigError(
            f"{name}.min_resize_scale: {dataset.min_resize_scale} is above max_resize_scale "
            f"({dataset.max_resize_scale})"
        )
    if dataset.final_size < 16:
        raise ConfigError(f"{name}.final_size: {dataset.final_size} is below 16 pixels")
    workers = dataset.num_workers
    if workers != "auto" and (isinstance(workers, str) or workers < 0):
        raise ConfigError(f"{name}.num_workers: {workers!r} is neither a number nor auto")
    if not dataset.path:
        raise ConfigError(f"{name}.path is empty; give the folder or bucket that holds the data")
    if "://" in dataset.path:
        if not dataset.is_streaming:
            raise ConfigError(f"{name}.path is remote; set {name}.is_streaming=true for MDS shards")
        if not dataset.local:
            raise ConfigError(f"{name}.local is empty; give a folder to cache the shards in")
    elif not os.path.isdir(dataset.path):
        raise ConfigError(f"{name}.path: no folder {dataset.path}")
    elif not dataset.is_streaming:
        images = f"images/{FOLDERS[split]}"
        if not (find_root(dataset.path) / images).is_dir():
            raise ConfigError(f"{name}.path: {dataset.path} holds no {ADE20K}/{images}")


def help_text() -> str:
    """Return the keys of the YAML with their defaults and meanings, a line each."""

    def lines(schema: type, prefix: str) -> list[str]:
        result = []
        hints = get_type_hints(schema)
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(hints[field.name]):
                result += lines(hints[field.name], f"{prefix}{field.name}.")
                continue
            default = None if field.name == "loggers" else field.default
            shown = {None: "(empty)", True: "true", False: "false"}.get(
                default if default is None or isinstance(default, bool) else "", str(default)
            )
            result.append(f"  {prefix + field.name:<39} {shown:<14} {field.metadata['meaning']}")
        return result

    head = "usage: composer main.py CONFIG [key=value ...]\n\nkeys of CONFIG, defaults, meanings:\n"
    return head + "\n".join(lines(Config, ""))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1] if isinstance(error, OmegaConfBaseException) else lines)
