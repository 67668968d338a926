"""The typed schema of the YAML: every key, its default and what it means."""

# ruff: noqa: RUF009 (key() makes a dataclasses.field)

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


def key(default: Any, meaning: str, bounds: str = "(-inf, inf)") -> Any:
    """Return a config key.

    Args:
        default: Its default.
        meaning: The line that `main.py --help` prints for it.
        bounds: Where a number, or each in a list, has to be, as an interval: `[0, 1)` has 0, not 1.
    """
    metadata = {"meaning": meaning, "bounds": bounds}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """The network and its loss."""

    name: str = key(
        "deeplabv3",
        "or mmseg:, torchvision:, smp:, hf:, timm: and a name of theirs, or module:function",
    )
    arguments: dict[str, Any] | None = key(None, "arguments of a network other than deeplabv3")
    num_classes: int = key(150, "number of classes", "[2, 253]")
    backbone_arch: str = key("resnet101", "torchvision ResNet with bottleneck blocks")
    backbone_weights: str | None = key(
        "IMAGENET1K_V2",
        "IMAGENET1K_V1, IMAGENET1K_V2, a path or URL, or none (empty); of others: theirs, or none",
    )
    freeze_backbone: str | None = key(None, "time that the backbone is kept as it is, as in 2ep")
    sync_bn: bool = key(True, "share BatchNorm statistics between the processes of a node")
    use_plus: bool = key(True, "DeepLabV3+ rather than DeepLabV3")
    cross_entropy_weight: float = key(0.375, "weight of the cross entropy in the loss", "[0, inf)")
    dice_weight: float = key(1.125, "weight of the Dice loss in the loss", "[0, inf)")
    fused_loss: bool | str = key(
        "auto", "auto: Triton kernels on a GPU; false: PyTorch's operations, for the same loss"
    )
    class_weights: Any = key(
        None, "of the loss: auto (by share of pixels), a list, or {name: weight}; empty: all 1"
    )


@dataclass
class DatasetConfig:
    """A data set, and how its samples are made."""

    is_streaming: bool = key(False, "MDS shards (Streaming) rather than folders")
    path: str | None = key(
        None,
        "folder that holds ADEChallengeData2016, or the shards (also s3://...), or data's root",
    )
    local: str | None = key(None, "streaming: local folder that caches the shards")
    base_size: int = key(
        512, "length of the shorter side before the random resize, pixels", f"[1, {MAX_SIDE}]"
    )
    min_resize_scale: float = key(0.5, "smallest random resize factor", "(0, 100]")
    max_resize_scale: float = key(2.0, "largest random resize factor", "(0, 100]")
    final_size: int = key(
        512, "side of the square that the network gets, pixels", f"[16, {MAX_SIDE}]"
    )
    max_class_share: float = key(
        0.75,
        "share of a crop above which one class has it drawn again, up to ten times; 1: never",
        "(0, 1]",
    )
    rare_class_sampling: float | None = key(
        None, "photos of a class in a smaller share than this come up more often, as 0.01", "(0, 1]"
    )
    ignore_background: bool = key(True, "label 0 is ignored and label k is class k - 1")
    ignore_label: int | None = key(None, "a further label value to ignore", "[0, 255]")
    batch_size: int = key(128, "images a step, over all GPUs", f"[1, {2**20}]")
    drop_last: bool = key(True, "leave out an epoch's last incomplete batch")
    num_workers: int | str = key(
        "auto", "loader processes per GPU; auto fits the machine", "[0, 256]"
    )
    cache_limit: str | None = key(None, "streaming: most the cache may take, as in 100gb")
    shuffle_seed: int | None = key(
        None, "seed of the order of samples; empty: the run's seed", f"[0, {MAX_SEED}]"
    )
    predownload: int | None = key(None, "streaming: samples to download ahead", "[1, inf)")
    download_retry: int = key(6, "streaming: times to retry a failed download", "[0, 1000]")
    download_timeout: float = key(60.0, "streaming: seconds to wait for a shard", "(0, inf)")
    validate_hash: str | None = key("auto", "streaming: verify shards: auto, or a hash as sha1")


@dataclass
class EvalDatasetConfig(DatasetConfig):
    """The data set of evaluation."""

    drop_last: bool = key(False, "kept for the reference's files; every sample is scored once")


@dataclass
class OptimizerConfig:
    """Which optimizer, and of which weights."""

    name: str = key("sgdw", "sgdw or adamw, with weight decay apart from the gradient")
    lr: float = key(0.08, "learning rate", "(0, inf)")
    momentum: float = key(0.9, "sgdw: momentum", "[0, 1)")
    betas: list[float] = key([0.9, 0.999], "adamw: decay of the two moving averages", "[0, 1)")
    weight_decay: float = key(5.0e-5, "decoupled weight decay, a fraction per step", "[0, 1)")
    no_decay: list[str] = key([], "what does not decay: any of norm, bias")
    head_lr_scale: float = key(
        1.0, "learning rate outside the backbone, relative to lr", "(0, inf)"
    )
    clip_norm: float | None = key(
        None, "longest gradient, in the 2-norm over all weights", "(0, inf)"
    )


@dataclass
class ScheduleConfig:
    """How the learning rate goes on from `optimizer.lr`."""

    name: str | None = key(None, "cosine, poly, constant or linear; empty: the recipe's")
    warmup: str = key("0ba", "time in which it rises from 0 to optimizer.lr")
    final: float = key(0.0, "where it ends, relative to optimizer.lr", "[0, inf)")
    power: float = key(0.9, "poly: the power of what is left of the run", "(0, inf)")


@dataclass
class EMAConfig:
    """The moving average of the weights."""

    half_life: str = key("1000ba", "half-life of the averaged weights")
    update_interval: str = key("10ba", "time between updates of the average")


@dataclass
class SAMConfig:
    """Sharpness-aware minimisation."""

    rho: float = key(0.3, "radius of the neighbourhood (sharpness-aware minimisation)", "(0, inf)")
    interval: int = key(2, "steps between two sharpness-aware ones", "[1, inf)")


@dataclass
class MixUpConfig:
    """Blending photos in pairs."""

    alpha: float = key(0.2, "the mixing coefficient is drawn from Beta(alpha, alpha)", "[0, 1000]")


@dataclass
class HotEMAConfig(EMAConfig):
    """The hot recipe's."""

    half_life: str = key("2000ba", "half-life of the averaged weights")
    update_interval: str = key("1ba", "time between updates of the average")


@dataclass
class HotSAMConfig(SAMConfig):
    """The hot recipe's."""

    interval: int = key(1, "steps between two sharpness-aware ones", "[1, inf)")


@dataclass
class HotMixUpConfig(MixUpConfig):
    """The hot recipe's."""

    alpha: float = key(0.5, "the mixing coefficient is drawn from Beta(alpha, alpha)", "[0, 1000]")


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
    seed: int = key(
        17, "seed of the weights, the order of the data and the augmentation", f"[0, {MAX_SEED}]"
    )
    max_duration: str = key("128ep", "duration without a recipe, as in 128ep or 20000ba")
    recipe_name: str | None = key(None, "mild, medium or hot; empty: the plain baseline")
    device_train_microbatch_size: int | str | None = key(
        "auto",
        "images a GPU takes at once; auto: as many as fit its memory; empty: all",
        "[1, inf)",
    )
    grad_accum: int | str | None = key(
        None, "older name: parts that a GPU takes its images in, auto or a number"
    )
    precision: str = key("auto", "auto, fp32, amp_bf16 or amp_fp16")
    compile: bool | str = key("auto", "torch.compile the model; auto: on a GPU")
    activation_memory_budget: float = key(
        1.0, "compiled: share of the activations to keep; less makes room for more images", "[0, 1]"
    )
    deterministic: bool = key(False, "the same bits in every run on a GPU too, but slower")
    model: ModelConfig = key(ModelConfig, "")
    data: Any = key(
        None, "description of the data set (a YAML, or its keys here); empty: ADE20K's layout"
    )
    train_dataset: DatasetConfig = key(DatasetConfig, "")
    eval_dataset: EvalDatasetConfig = key(EvalDatasetConfig, "")
    eval_interval: str = key("1ep", "time between evaluations")
    eval_first: bool = key(False, "also evaluate before the first step")
    train_metrics_interval: int = key(
        0, "batches between two scores of a training batch; 0: never", "[0, inf)"
    )
    pictures: int = key(4, "validation photos to draw at each evaluation; 0: none", "[0, 100]")
    class_table_csv: bool = key(False, "write each evaluation's class table below save_folder")
    class_names: str | None = key(None, "file with a class name a line; empty: ADE20K's if 150")
    optimizer: OptimizerConfig = key(OptimizerConfig, "")
    schedule: ScheduleConfig = key(ScheduleConfig, "")
    mild: MildConfig = key(MildConfig, "")
    medium: MediumConfig = key(MediumConfig, "")
    hot: HotConfig = key(HotConfig, "")
    loggers: dict[str, Any] = key(dict, f"any of {', '.join(LOGGERS)}, each with its arguments")
    save_folder: str | None = key(None, "where checkpoints go: a folder or s3://...")
    save_interval: str = key("1ep", "time between checkpoints")
    save_num_checkpoints_to_keep: int = key(1, "newest checkpoints to keep; -1: all")
    save_best: bool = key(False, "also keep the checkpoint of the best evaluation")
    best_metric: str = key("MIoU", "what the best has the most of: MIoU, or IoU/NAME of a class")
    stop_after: str | None = key(None, "time without a better evaluation after which a run ends")
    save_overwrite: bool = key(False, "replace what an earlier run left in save_folder")
    load_path: str | None = key(None, "checkpoint to begin from, or to evaluate")
    load_weights_only: bool = key(False, "take only the weights from load_path, and start anew")
    load_least: float = key(
        0.5, "share of the tensors that have to fit, of weights alone", "[0, 1]"
    )
    load_classes_by_name: bool = key(
        False, "of weights alone: also take over classes that have the same name"
    )
    autoresume: bool = key(False, "go on from the newest whole checkpoint in save_folder, if any")
    python_log_level: str | None = key("warning", "debug, info, warning or error")
