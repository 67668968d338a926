"""The typed schema of the YAML config, with the default and the meaning of each key."""

# ruff: noqa: RUF009 (key() makes a dataclasses.field)

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from training.keys import APPLIED, COMPARED, FREE, key, keys_of
from training.recipes import BASELINE, RECIPES, RecipeConfig

# Composer's loggers, and the Python package that each of them needs, or None. Composer's install
# extra for the package has the same name as the logger.
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
# Longest image side, in pixels.
MAX_SIDE = 16384
# NumPy accepts 32-bit seeds. Leave some room, because the rank is added to the seed.
MAX_SEED = 2**32 - 2**16
# Maps each network library to the Python package that it needs, or to None. The install extra has
# the same name as the library.
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
    """Settings of the network and its loss."""

    name: str = key(
        COMPARED,
        "deeplabv3",
        "deeplabv3, or LIBRARY:NAME with mmseg, torchvision, smp, hf or timm, or module:function",
    )
    arguments: dict[str, Any] | None = key(
        COMPARED, None, "arguments of a network other than deeplabv3"
    )
    num_classes: int = key(COMPARED, 150, "number of classes", "[2, 253]")
    backbone_arch: str = key(COMPARED, "resnet101", "torchvision ResNet with bottleneck blocks")
    backbone_weights: str | None = key(
        FREE,
        "IMAGENET1K_V2",
        "IMAGENET1K_V1, IMAGENET1K_V2, a path or a URL; empty: start from random weights",
    )
    freeze_backbone: str | None = key(
        APPLIED, None, "freeze the backbone for this long, for example 2ep"
    )
    sync_bn: bool = key(APPLIED, True, "share BatchNorm statistics between the ranks of a node")
    use_plus: bool = key(COMPARED, True, "true: DeepLabV3+; false: DeepLabV3")
    cross_entropy_weight: float = key(
        APPLIED, 0.375, "weight of the cross entropy in the loss", "[0, inf)"
    )
    dice_weight: float = key(APPLIED, 1.125, "weight of the Dice loss in the loss", "[0, inf)")
    fused_loss: bool | str = key(
        FREE,
        "auto",
        "auto: compute the loss with Triton kernels on a GPU; false: with PyTorch's operations",
    )
    class_weights: Any = key(
        APPLIED,
        None,
        "weights in the loss: auto (from the share of pixels), a list, or {name: weight}",
    )


@dataclass
class DatasetConfig:
    """Settings of a data set and its transforms."""

    is_streaming: bool = key(FREE, False, "true: read MDS shards; false: read folders")
    path: str | None = key(
        APPLIED,
        None,
        "folder that holds ADEChallengeData2016, root of described data, or folder or URL "
        "of shards",
    )
    local: str | None = key(FREE, None, "shards: local folder for the cache")
    base_size: int = key(
        APPLIED,
        512,
        "side of the square that images are resized to first, pixels",
        f"[1, {MAX_SIDE}]",
    )
    min_resize_scale: float = key(APPLIED, 0.5, "smallest factor of the random resize", "(0, 100]")
    max_resize_scale: float = key(APPLIED, 2.0, "largest factor of the random resize", "(0, 100]")
    final_size: int = key(
        APPLIED,
        512,
        "side of the network's square input: a random crop in training, the resized image in "
        "evaluation, pixels",
        f"[16, {MAX_SIDE}]",
    )
    ignore_background: bool = key(COMPARED, True, "ignore label 0; label k is class k - 1")
    ignore_label: int | None = key(COMPARED, None, "one more label to ignore", "[0, 255]")
    batch_size: int = key(APPLIED, 128, "images per step, over all GPUs", f"[1, {2**20}]")
    drop_last: bool = key(APPLIED, True, "leave out the last batch of an epoch if it is not full")
    num_workers: int | str = key(
        FREE, "auto", "loader processes per GPU; auto: one per core, at most 8", "[0, 256]"
    )
    cache_limit: str | None = key(
        APPLIED, None, "shards: largest size of the cache, for example 100gb"
    )
    predownload: int | None = key(FREE, None, "shards: samples to download ahead", "[1, inf)")
    download_retry: int = key(FREE, 6, "shards: retries of a failed download", "[0, 1000]")
    download_timeout: float = key(FREE, 60.0, "shards: seconds to wait for an answer", "(0, inf)")
    validate_hash: str | None = key(
        FREE, "auto", "shards: verify them with this hash; auto: the first that they list"
    )


@dataclass
class TrainDatasetConfig(DatasetConfig):
    """Settings of the training data set."""

    max_class_share: float = key(
        APPLIED,
        0.75,
        "draw a crop again, up to 10 times, while one class has more than this share; 1: never",
        "(0, 1]",
    )
    rare_class_sampling: float | None = key(
        APPLIED,
        None,
        "repeat images of classes that are in less than this share of the images",
        "(0, 1]",
    )
    shuffle_seed: int | None = key(
        COMPARED, None, "seed of the order of samples; empty: seed", f"[0, {MAX_SEED}]"
    )


@dataclass
class EvalDatasetConfig(DatasetConfig):
    """Settings of the evaluation data set, whose images are not cropped and keep their order."""

    # MosaicML's YAML files contain these keys, so accept them even though they have no effect.
    base_size: int = key(FREE, 512, "has no effect", f"[1, {MAX_SIDE}]")
    min_resize_scale: float = key(FREE, 0.5, "has no effect", "(0, 100]")
    max_resize_scale: float = key(FREE, 2.0, "has no effect", "(0, 100]")
    drop_last: bool = key(FREE, False, "has no effect")


@dataclass
class OptimizerConfig:
    """Settings of the optimizer, including special settings for some groups of parameters."""

    name: str = key(COMPARED, "sgdw", "sgdw or adamw, both with decoupled weight decay")
    lr: float = key(APPLIED, 0.08, "learning rate", "(0, inf)")
    momentum: float = key(APPLIED, 0.9, "sgdw: momentum", "[0, 1)")
    betas: list[float] = key(
        APPLIED, [0.9, 0.999], "adamw: decay rates of the two moving averages", "[0, 1)"
    )
    weight_decay: float = key(
        APPLIED, 5.0e-5, "decoupled weight decay, as a fraction per step", "[0, 1)"
    )
    no_decay: list[str] = key(COMPARED, [], "parameters without weight decay: norm, bias, or both")
    head_lr_scale: float = key(
        COMPARED, 1.0, "learning rate outside the backbone, as a multiple of lr", "(0, inf)"
    )
    layer_decay: float = key(
        COMPARED,
        1.0,
        "vision transformers: rate and weight decay of a layer, as a multiple of the next layer's",
        "(0, 1]",
    )
    clip_norm: float | None = key(
        APPLIED, None, "clip the gradient to this norm (2-norm over all weights)", "(0, inf)"
    )


@dataclass
class ScheduleConfig:
    """Settings of the learning-rate schedule, relative to `optimizer.lr`."""

    name: str | None = key(
        APPLIED, None, "cosine, poly, constant or linear; empty: the recipe's schedule"
    )
    warmup: str = key(APPLIED, "0ba", "time of the linear warm-up from 0 to optimizer.lr")
    final: float = key(
        APPLIED, 0.0, "final learning rate, as a multiple of optimizer.lr", "[0, inf)"
    )
    power: float = key(APPLIED, 0.9, "poly: exponent", "(0, inf)")


@dataclass
class Config:
    """All keys of the YAML config."""

    run_name: str | None = key(
        COMPARED, None, "name of the run; empty: $RUN_NAME, or a generated name"
    )
    is_train: bool = key(FREE, True, "true: train; false: evaluate once")
    seed: int = key(
        COMPARED,
        17,
        "seed of the weights, the order of samples and the augmentation",
        f"[0, {MAX_SEED}]",
    )
    max_duration: str = key(
        APPLIED, BASELINE.max_duration, "duration without a recipe, for example 128ep or 20000ba"
    )
    recipe_name: str | None = key(
        COMPARED, None, f"{', '.join(RECIPES)}; empty: the plain baseline"
    )
    device_train_microbatch_size: int | str | None = key(
        APPLIED,
        "auto",
        "images that a GPU computes at once; auto: as many as fit; empty: its share of the batch",
        "[1, inf)",
    )
    grad_accum: int | str | None = key(
        APPLIED, None, "older key: number of micro-batches per step, or auto", "[1, inf)"
    )
    precision: str = key(APPLIED, "auto", "auto, fp32, amp_bf16 or amp_fp16")
    compile: bool | str = key(
        FREE, "auto", "compile the network with torch.compile; auto: only on a GPU"
    )
    activation_memory_budget: float = key(
        FREE,
        1.0,
        "compiled: share of the activations to keep in memory",
        "[0, 1]",
    )
    deterministic: bool = key(FREE, False, "use deterministic GPU operations, which are slower")
    model: ModelConfig = field(default_factory=ModelConfig)
    data: Any = key(
        COMPARED,
        None,
        "description of the data set, as a YAML file or as keys here; empty: ADE20K's layout",
    )
    train_dataset: TrainDatasetConfig = field(default_factory=TrainDatasetConfig)
    eval_dataset: EvalDatasetConfig = field(default_factory=EvalDatasetConfig)
    eval_interval: str = key(FREE, "1ep", "time between evaluations")
    eval_first: bool = key(FREE, False, "also evaluate before the first step")
    train_metrics_interval: int = key(
        FREE, 0, "batches from one training score to the next; 0: never", "[0, inf)"
    )
    pictures: int = key(
        FREE, 4, "validation images to draw at each evaluation; 0: none", "[0, 100]"
    )
    class_table_csv: bool = key(
        FREE, False, "write the class table of each evaluation below save_folder"
    )
    class_names: str | None = key(
        COMPARED,
        None,
        "file with one class name per line; empty: the names of ADE20K if there are 150 classes",
    )
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    mild: RecipeConfig = field(default_factory=RECIPES["mild"].section)
    medium: RecipeConfig = field(default_factory=RECIPES["medium"].section)
    hot: RecipeConfig = field(default_factory=RECIPES["hot"].section)
    loggers: dict[str, Any] = key(FREE, {}, f"any of {', '.join(LOGGERS)}, each with its arguments")
    save_folder: str | None = key(
        FREE, None, "folder or URL (s3://...) for checkpoints, pictures and the report"
    )
    save_interval: str = key(FREE, "1ep", "time between checkpoints")
    save_num_checkpoints_to_keep: int = key(
        FREE, 1, "number of newest checkpoints to keep; -1: all"
    )
    save_best: bool = key(FREE, False, "also keep the checkpoint of the best evaluation")
    best_metric: str = key(
        APPLIED, "MIoU", "metric of the best evaluation: MIoU, or IoU/NAME for a class"
    )
    stop_after: str | None = key(
        APPLIED, None, "end the run after this time without a better evaluation"
    )
    save_overwrite: bool = key(
        FREE, False, "replace the checkpoints of an earlier run in save_folder"
    )
    load_path: str | None = key(FREE, None, "checkpoint to begin from, or to evaluate")
    load_weights_only: bool = key(
        FREE, False, "load only the weights of load_path, and start at batch 0"
    )
    load_least: float = key(
        FREE, 0.5, "weights only: minimum share of the tensors that must match", "[0, 1]"
    )
    load_classes_by_name: bool = key(
        FREE, False, "weights only: keep the weights of classes that have the same name"
    )
    autoresume: bool = key(
        FREE, False, "resume from the newest complete checkpoint in save_folder, if there is one"
    )
    python_log_level: str | None = key(FREE, "warning", "debug, info, warning or error")

    @property
    def recipe(self) -> RecipeConfig:
        """The settings of the chosen recipe, or of the baseline, which has no algorithms."""
        if self.recipe_name is None:
            return RecipeConfig(self.max_duration)
        return getattr(self, self.recipe_name)


def compared_values(config: Config) -> dict[str, Any]:
    """Return the config values that must match the checkpoint from which a run resumes."""
    return {
        name: value
        for name, field, value in keys_of(config)
        if field.metadata["on_resume"] == COMPARED
    }
