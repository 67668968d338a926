"""The typed schema of the YAML: every key, its default and what it means."""

# ruff: noqa: RUF009 (key() and section() make a dataclasses.field)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

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
SCHEDULES = ("cosine", "poly", "constant", "linear")
MAX_SIDE = 16384  # pixels
MAX_SEED = 2**32 - 2**16  # numpy takes 32 bits, and each process one of its own
# What networks come from, and the package that each needs besides (an extra of the name before it).
LIBRARIES = {
    "mmseg": None,
    "torchvision": None,
    "smp": "segmentation_models_pytorch",
    "hf": "transformers",
    "timm": "timm",
}
PRECISIONS = ("auto", "fp32", "amp_bf16", "amp_fp16")


# What a resumed run does with a key whose value differs from the one in the checkpoint's record.
APPLIED = "applied"  # it trains on with the new value
COMPARED = "compared"  # it is refused
FREE = "free"  # it may differ: the key does not enter the training


def key(on_resume: str, default: Any, meaning: str, bounds: str = "(-inf, inf)") -> Any:
    """Return a config key.

    Args:
        on_resume: `APPLIED`, `COMPARED` or `FREE`.
        default: Its default.
        meaning: The line that `main.py --help` prints for it.
        bounds: Interval that a number, or each number of a list, has to be in; `[0, 1)` includes 0
            and excludes 1.
    """
    metadata = {"meaning": meaning, "bounds": bounds, "on_resume": on_resume}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(schema: type) -> Any:
    """Return a section of keys."""
    return dataclasses.field(default_factory=schema)


@dataclass
class ModelConfig:
    """The network and its loss."""

    name: str = key(
        COMPARED,
        "deeplabv3",
        "or mmseg:, torchvision:, smp:, hf:, timm: and a name of theirs, or module:function",
    )
    arguments: dict[str, Any] | None = key(
        COMPARED, None, "arguments of a network other than deeplabv3"
    )
    num_classes: int = key(COMPARED, 150, "number of classes", "[2, 253]")
    backbone_arch: str = key(COMPARED, "resnet101", "torchvision ResNet with bottleneck blocks")
    backbone_weights: str | None = key(
        FREE,
        "IMAGENET1K_V2",
        "IMAGENET1K_V1, IMAGENET1K_V2, a path or URL, or none (empty); of others: theirs, or none",
    )
    freeze_backbone: str | None = key(
        APPLIED, None, "time that the backbone is kept as it is, as in 2ep"
    )
    sync_bn: bool = key(APPLIED, True, "share BatchNorm statistics between the processes of a node")
    use_plus: bool = key(COMPARED, True, "DeepLabV3+ rather than DeepLabV3")
    cross_entropy_weight: float = key(
        APPLIED, 0.375, "weight of the cross entropy in the loss", "[0, inf)"
    )
    dice_weight: float = key(APPLIED, 1.125, "weight of the Dice loss in the loss", "[0, inf)")
    fused_loss: bool | str = key(
        FREE,
        "auto",
        "auto: Triton kernels on a GPU; false: PyTorch's operations, for the same loss",
    )
    class_weights: Any = key(
        APPLIED,
        None,
        "of the loss: auto (by share of pixels), a list, or {name: weight}; empty: all 1",
    )


@dataclass
class DatasetConfig:
    """A data set, and how its samples are made."""

    is_streaming: bool = key(FREE, False, "MDS shards (Streaming) rather than folders")
    path: str | None = key(
        APPLIED,
        None,
        "folder that holds ADEChallengeData2016, or the shards (also s3://...), or data's root",
    )
    local: str | None = key(FREE, None, "streaming: local folder that caches the shards")
    base_size: int = key(
        APPLIED,
        512,
        "length of the shorter side before the random resize, pixels",
        f"[1, {MAX_SIDE}]",
    )
    min_resize_scale: float = key(APPLIED, 0.5, "smallest random resize factor", "(0, 100]")
    max_resize_scale: float = key(APPLIED, 2.0, "largest random resize factor", "(0, 100]")
    final_size: int = key(
        APPLIED, 512, "side of the square that the network gets, pixels", f"[16, {MAX_SIDE}]"
    )
    ignore_background: bool = key(COMPARED, True, "label 0 is ignored and label k is class k - 1")
    ignore_label: int | None = key(COMPARED, None, "a further label value to ignore", "[0, 255]")
    batch_size: int = key(APPLIED, 128, "images a step, over all GPUs", f"[1, {2**20}]")
    drop_last: bool = key(APPLIED, True, "leave out an epoch's last incomplete batch")
    num_workers: int | str = key(
        FREE, "auto", "loader processes per GPU; auto fits the machine", "[0, 256]"
    )
    cache_limit: str | None = key(APPLIED, None, "streaming: most the cache may take, as in 100gb")
    predownload: int | None = key(FREE, None, "streaming: samples to download ahead", "[1, inf)")
    download_retry: int = key(FREE, 6, "streaming: times to retry a failed download", "[0, 1000]")
    download_timeout: float = key(FREE, 60.0, "streaming: seconds to wait for a shard", "(0, inf)")
    validate_hash: str | None = key(
        FREE, "auto", "streaming: verify shards: auto, or a hash as sha1"
    )


@dataclass
class TrainDatasetConfig(DatasetConfig):
    """The data set of training."""

    max_class_share: float = key(
        APPLIED,
        0.75,
        "share of a crop above which one class has it drawn again, up to ten times; 1: never",
        "(0, 1]",
    )
    rare_class_sampling: float | None = key(
        APPLIED,
        None,
        "photos of a class in a smaller share than this come up more often, as 0.01",
        "(0, 1]",
    )
    shuffle_seed: int | None = key(
        COMPARED, None, "seed of the order of samples; empty: the run's seed", f"[0, {MAX_SEED}]"
    )


@dataclass
class EvalDatasetConfig(DatasetConfig):
    """The data set of evaluation, which sees every image once, in order, and not in crops."""

    # Without effect, but the reference's YAMLs have them.
    base_size: int = key(FREE, 512, "without effect", f"[1, {MAX_SIDE}]")
    min_resize_scale: float = key(FREE, 0.5, "without effect", "(0, 100]")
    max_resize_scale: float = key(FREE, 2.0, "without effect", "(0, 100]")
    drop_last: bool = key(FREE, False, "without effect")


@dataclass
class OptimizerConfig:
    """Which optimizer, and of which weights."""

    name: str = key(COMPARED, "sgdw", "sgdw or adamw, with weight decay apart from the gradient")
    lr: float = key(APPLIED, 0.08, "learning rate", "(0, inf)")
    momentum: float = key(APPLIED, 0.9, "sgdw: momentum", "[0, 1)")
    betas: list[float] = key(
        APPLIED, [0.9, 0.999], "adamw: decay of the two moving averages", "[0, 1)"
    )
    weight_decay: float = key(
        APPLIED, 5.0e-5, "decoupled weight decay, a fraction per step", "[0, 1)"
    )
    no_decay: list[str] = key(COMPARED, [], "what does not decay: any of norm, bias")
    head_lr_scale: float = key(
        COMPARED, 1.0, "learning rate outside the backbone, relative to lr", "(0, inf)"
    )
    clip_norm: float | None = key(
        APPLIED, None, "longest gradient, in the 2-norm over all weights", "(0, inf)"
    )


@dataclass
class ScheduleConfig:
    """How the learning rate goes on from `optimizer.lr`."""

    name: str | None = key(APPLIED, None, "cosine, poly, constant or linear; empty: the recipe's")
    warmup: str = key(APPLIED, "0ba", "time in which it rises from 0 to optimizer.lr")
    final: float = key(APPLIED, 0.0, "where it ends, relative to optimizer.lr", "[0, inf)")
    power: float = key(APPLIED, 0.9, "poly: the power of what is left of the run", "(0, inf)")


@dataclass
class EMAConfig:
    """The moving average of the weights."""

    half_life: str = key(APPLIED, "1000ba", "half-life of the averaged weights")
    update_interval: str = key(APPLIED, "10ba", "time between updates of the average")


@dataclass
class SAMConfig:
    """Sharpness-aware minimisation."""

    rho: float = key(
        APPLIED, 0.3, "radius of the neighbourhood (sharpness-aware minimisation)", "(0, inf)"
    )
    interval: int = key(APPLIED, 2, "steps between two sharpness-aware ones", "[1, inf)")


@dataclass
class MixUpConfig:
    """Blending photos in pairs."""

    alpha: float = key(
        APPLIED, 0.2, "the mixing coefficient is drawn from Beta(alpha, alpha)", "[0, 1000]"
    )


@dataclass
class HotEMAConfig(EMAConfig):
    """The hot recipe's."""

    half_life: str = key(APPLIED, "2000ba", "half-life of the averaged weights")
    update_interval: str = key(APPLIED, "1ba", "time between updates of the average")


@dataclass
class HotSAMConfig(SAMConfig):
    """The hot recipe's."""

    interval: int = key(APPLIED, 1, "steps between two sharpness-aware ones", "[1, inf)")


@dataclass
class HotMixUpConfig(MixUpConfig):
    """The hot recipe's."""

    alpha: float = key(
        APPLIED, 0.5, "the mixing coefficient is drawn from Beta(alpha, alpha)", "[0, 1000]"
    )


@dataclass
class MildConfig:
    """The recipe for short runs."""

    max_duration: str = key(APPLIED, "25ep", "duration of the mild recipe")
    ema: EMAConfig = section(EMAConfig)


@dataclass
class MediumConfig:
    """The recipe for longer runs."""

    max_duration: str = key(APPLIED, "90ep", "duration of the medium recipe")
    ema: EMAConfig = section(EMAConfig)
    sam: SAMConfig = section(SAMConfig)
    mixup: MixUpConfig = section(MixUpConfig)


@dataclass
class HotConfig:
    """The recipe for the longest runs."""

    max_duration: str = key(APPLIED, "240ep", "duration of the hot recipe")
    ema: HotEMAConfig = section(HotEMAConfig)
    sam: HotSAMConfig = section(HotSAMConfig)
    mixup: HotMixUpConfig = section(HotMixUpConfig)


@dataclass
class Config:
    """The whole YAML."""

    run_name: str | None = key(COMPARED, None, "name of the run; empty: $RUN_NAME, else made up")
    is_train: bool = key(FREE, True, "train; false: evaluate once")
    seed: int = key(
        COMPARED,
        17,
        "seed of the weights, the order of the data and the augmentation",
        f"[0, {MAX_SEED}]",
    )
    max_duration: str = key(APPLIED, "128ep", "duration without a recipe, as in 128ep or 20000ba")
    recipe_name: str | None = key(COMPARED, None, "mild, medium or hot; empty: the plain baseline")
    device_train_microbatch_size: int | str | None = key(
        APPLIED,
        "auto",
        "images a GPU takes at once; auto: as many as fit its memory; empty: all",
        "[1, inf)",
    )
    grad_accum: int | str | None = key(
        APPLIED, None, "older name: parts that a GPU takes its images in, auto or a number"
    )
    precision: str = key(APPLIED, "auto", "auto, fp32, amp_bf16 or amp_fp16")
    compile: bool | str = key(FREE, "auto", "torch.compile the model; auto: on a GPU")
    activation_memory_budget: float = key(
        FREE,
        1.0,
        "compiled: share of the activations to keep; less makes room for more images",
        "[0, 1]",
    )
    deterministic: bool = key(FREE, False, "the same bits in every run on a GPU too, but slower")
    model: ModelConfig = section(ModelConfig)
    data: Any = key(
        COMPARED,
        None,
        "description of the data set (a YAML, or its keys here); empty: ADE20K's layout",
    )
    train_dataset: TrainDatasetConfig = section(TrainDatasetConfig)
    eval_dataset: EvalDatasetConfig = section(EvalDatasetConfig)
    eval_interval: str = key(FREE, "1ep", "time between evaluations")
    eval_first: bool = key(FREE, False, "also evaluate before the first step")
    train_metrics_interval: int = key(
        FREE, 0, "batches between two scores of a training batch; 0: never", "[0, inf)"
    )
    pictures: int = key(
        FREE, 4, "validation photos to draw at each evaluation; 0: none", "[0, 100]"
    )
    class_table_csv: bool = key(
        FREE, False, "write each evaluation's class table below save_folder"
    )
    class_names: str | None = key(
        COMPARED, None, "file with a class name a line; empty: ADE20K's if 150"
    )
    optimizer: OptimizerConfig = section(OptimizerConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    mild: MildConfig = section(MildConfig)
    medium: MediumConfig = section(MediumConfig)
    hot: HotConfig = section(HotConfig)
    loggers: dict[str, Any] = key(
        FREE, dict, f"any of {', '.join(LOGGERS)}, each with its arguments"
    )
    save_folder: str | None = key(FREE, None, "where checkpoints go: a folder or s3://...")
    save_interval: str = key(FREE, "1ep", "time between checkpoints")
    save_num_checkpoints_to_keep: int = key(FREE, 1, "newest checkpoints to keep; -1: all")
    save_best: bool = key(FREE, False, "also keep the checkpoint of the best evaluation")
    best_metric: str = key(
        APPLIED, "MIoU", "what the best has the most of: MIoU, or IoU/NAME of a class"
    )
    stop_after: str | None = key(
        APPLIED, None, "time without a better evaluation after which a run ends"
    )
    save_overwrite: bool = key(FREE, False, "replace what an earlier run left in save_folder")
    load_path: str | None = key(FREE, None, "checkpoint to begin from, or to evaluate")
    load_weights_only: bool = key(
        FREE, False, "take only the weights from load_path, and start anew"
    )
    load_least: float = key(
        FREE, 0.5, "share of the tensors that have to fit, of weights alone", "[0, 1]"
    )
    load_classes_by_name: bool = key(
        FREE, False, "of weights alone: also take over classes that have the same name"
    )
    autoresume: bool = key(
        FREE, False, "go on from the newest whole checkpoint in save_folder, if any"
    )
    python_log_level: str | None = key(FREE, "warning", "debug, info, warning or error")


def flatten(section: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of all keys by their dotted names, as in `optimizer.lr`."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        is_section = dataclasses.is_dataclass(value)
        values |= flatten(value, f"{name}.") if is_section else {name: value}
    return values


def on_resume(section: Any, prefix: str = "") -> dict[str, str]:
    """Return for each key by its dotted name what a resumed run does with another value.

    Evaluation trains nothing, so all keys of `eval_dataset` are free but those that say what the
    labels mean.
    """
    kinds: dict[str, str] = {}
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            kinds |= on_resume(value, f"{name}.")
        elif prefix == "eval_dataset." and field.name not in ("ignore_background", "ignore_label"):
            kinds[name] = FREE
        else:
            kinds[name] = field.metadata["on_resume"]
    return kinds


def compared_values(config: Config) -> dict[str, Any]:
    """Return the values that have to be those of the checkpoint which a run resumes from."""
    kinds = on_resume(config)
    return {name: value for name, value in flatten(config).items() if kinds[name] == COMPARED}
