"""The typed schema of the YAML: every key, its default and what it means."""

# ruff: noqa: RUF009 (key() and section() make a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from training.keys import APPLIED, COMPARED, FREE, flatten, key, on_resume, section
from training.recipes import BASELINE, RECIPES, RecipeConfig

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
    max_duration: str = key(
        APPLIED, BASELINE.max_duration, "duration without a recipe, as in 128ep or 20000ba"
    )
    recipe_name: str | None = key(
        COMPARED, None, f"{', '.join(RECIPES)}; empty: the plain baseline"
    )
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
    mild: RecipeConfig = section(RECIPES["mild"].section)
    medium: RecipeConfig = section(RECIPES["medium"].section)
    hot: RecipeConfig = section(RECIPES["hot"].section)
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


def compared_values(config: Config) -> dict[str, Any]:
    """Return the values that have to be those of the checkpoint which a run resumes from."""
    kinds = on_resume(config)
    return {name: value for name, value in flatten(config).items() if kinds[name] == COMPARED}
