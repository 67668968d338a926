"""Tests of training/config_checks.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from errors import ClassError, ConfigError
from tests.support.layouts import NAMES, lay_out
from training.config import load, resolve
from training.config_checks import check_evaluates

WRONG = {
    "optimiser.lr=1": "unknown key optimiser; did you mean optimizer?",
    "model.backbone=resnet50": "unknown key model.backbone; did you mean model.backbone_arch?",
    "seed=abc": "seed: .*'abc'",
    "seed=null": "seed is empty",
    "optimizer=5": "optimizer: got 5; expected a section",
    "optimizer.lr=0": "optimizer.lr: 0.0 is out of range; use a finite number, more than 0",
    "optimizer.lr=.nan": "optimizer.lr: nan",
    "optimizer.name=adam": "optimizer.name: adam is unknown; use sgdw or adamw",
    "optimizer.name=adamw optimizer.lr=0.02": "optimizer.lr: 0.02 is too large for adamw",
    "optimizer.betas=[0.9]": "optimizer.betas: .* must be a list of two numbers",
    "optimizer.betas=[0.9,1]": "optimizer.betas: 1.0 is out of range; use at least 0 and less "
    "than 1",
    "optimizer.no_decay=[norms]": "optimizer.no_decay: norms is unknown; use norm or bias",
    "model.arguments=[a]": "model.arguments: got .'a'.; expected a mapping",
    "optimizer.no_decay=norm": "optimizer.no_decay: ",
    "optimizer.clip_norm=0": "optimizer.clip_norm: 0.0 is out of range; use a finite number, more "
    "than 0",
    "optimizer.head_lr_scale=-1": "optimizer.head_lr_scale: -1.0",
    "schedule.name=cosin": "schedule.name: cosin is unknown; use cosine, poly, constant or linear",
    "schedule.warmup=soon": "schedule.warmup: 'soon' is not a time; .* such as 25ep or 1000ba",
    "schedule.warmup=05ba": "schedule.warmup: '05ba' is not a time; .* such as 25ep or 1000ba",
    "schedule.power=0": "schedule.power: 0.0",
    "schedule.final=-0.1": "schedule.final: -0.1",
    "train_dataset.max_class_share=0": "max_class_share: 0.0 is out of range; use more than 0 and "
    "at most 1",
    "train_dataset.rare_class_sampling=2": "rare_class_sampling: 2.0 is out of range; use more "
    "than 0 and at most 1",
    "optimizer.momentum=1": "optimizer.momentum: 1.0 is out of range; use at least 0 and less "
    "than 1",
    "train_dataset.path=/nowhere": "train_dataset.path: cannot find the folder /nowhere",
    "train_dataset.path=null": "train_dataset.path is empty",
    "eval_dataset.path=s3://bucket/x": "eval_dataset.path is remote; set eval_dataset.is_streaming",
    "train_dataset.min_resize_scale=3": "min_resize_scale: 3.0 is above max_resize_scale",
    "train_dataset.final_size=-64": "train_dataset.final_size: -64",
    "train_dataset.num_workers=many": "num_workers: 'many' must be a number or auto",
    "device_train_microbatch_size=big": "device_train_microbatch_size: 'big'",
    "device_train_microbatch_size=0": "device_train_microbatch_size: 0 is out of range; use a "
    "finite number, at least 1",
    "max_duration=2 epochs": "max_duration: '2 epochs' is not a time",
    "save_interval=0ep": "save_interval: '0ep' is not a time",
    "recipe_name=mid": "recipe_name: mid is unknown; use mild, medium or hot",
    "precision=bf17": "precision: bf17 is unknown; use auto, fp32",
    "compile=maybe": "compile: maybe is unknown; use auto, true or false",
    "model.fused_loss=true": "model.fused_loss: True is unknown; use auto or false",
    "model.fused_loss=triton": "model.fused_loss: triton is unknown; use auto or false",
    "loggers.wanb={}": "loggers.wanb: no logger has this name; did you mean wandb?",
    "loggers.file=log.txt": "loggers.file: 'log.txt' must be a mapping of arguments",
    "loggers=wandb": "loggers: got 'wandb'; expected a section",
    "loggers.comet_ml={}": "comet_ml: a package is missing; run make install WITH=comet_ml",
    "model.num_classes=1000": "model.num_classes: 1000 is out of range; use 2 to 253",
    "model.dice_weight=0 model.cross_entropy_weight=0": "are both 0, so there is no loss",
    "save_num_checkpoints_to_keep=0": "save_num_checkpoints_to_keep: 0 must be 1 or more, or -1",
    "save_num_checkpoints_to_keep=-7": "save_num_checkpoints_to_keep: -7 must be 1 or more, or -1",
    "seed=99999999999999999999": "seed: 99999999999999999999 is out of range; use 0 to 4294901760",
    "train_dataset.shuffle_seed=-5": "train_dataset.shuffle_seed: -5 is out of range; use 0 to",
    "train_dataset.ignore_label=300": "train_dataset.ignore_label: 300 is out of range; use 0 to "
    "255",
    "train_dataset.final_size=100000": "train_dataset.final_size: 100000 is out of range; use 16 "
    "to 16384",
    "train_dataset.final_size=16384 train_dataset.batch_size=1024": "needs 1024.0 GB "
    "per batch, which is too much for this machine's memory; lower",
    "train_dataset.max_resize_scale=1e9": "max_resize_scale: 1000000000.0 is out of range; use "
    "more than 0 and",
    "train_dataset.max_resize_scale=90 train_dataset.base_size=512": "is 46080 pixels, but the "
    "limit is 32767",
    "train_dataset.num_workers=1000": "train_dataset.num_workers: 1000 is ",
    "train_dataset.cache_limit=12parsecs": "train_dataset.cache_limit: '12parsecs' is not a size",
    "train_dataset.download_timeout=-1": "train_dataset.download_timeout: -1.0 is out of range; "
    "use a finite",
    "run_name=../../x save_folder=runs/{run_name}": "run_name: '../../x' is not a valid folder "
    "name",
    "hot.sam.interval=0": "hot.sam.interval: 0 is out of range; use a finite number, at least 1",
    "load_least=2": "load_least: 2.0 is out of range; use 0 to 1",
    "load_least=.nan": "load_least: nan is out of range; use 0 to 1",
    "load_classes_by_name=true": "load_classes_by_name has no effect without "
    "load_weights_only=true",
    "grad_accum=many": "grad_accum: 'many' must be a number or auto",
    "grad_accum=0": "grad_accum: 0 is out of range; use a finite number, at least 1",
    "load_path=/nowhere.pt": "load_path: cannot find /nowhere.pt",
    "class_names=/nowhere.txt": "class_names: cannot find /nowhere.txt",
    "autoresume=true": "autoresume has no effect without save_folder",
    "autoresume=true save_folder=x run_name=null": "autoresume has no effect without run_name",
    "train_dataset.ignore_background=false": "train_dataset.ignore_background is false, "
    "but eval_dataset.ignore_background is true; set both to the same value",
    "eval_dataset.ignore_label=7": "train_dataset.ignore_label is none, but "
    "eval_dataset.ignore_label "
    "is 7; set both to the same value",
    "seed": "'seed': an override must have the form key=value",
    "activation_memory_budget=0.5 compile=false": "activation_memory_budget has no effect without "
    "compile; set compile",
    "load_weights_only=true": "load_weights_only has no effect without load_path; set load_path, "
    "or leave out",
    "load_least=0.9": "load_least has no effect without load_path",
    "best_metric=IoU/nosuch": "best_metric has no effect without save_folder",
    "stop_after=2ep": "stop_after has no effect without save_folder",
    "class_table_csv=true": "class_table_csv has no effect without save_folder",
    "optimizer.betas=[0.8,0.9]": "optimizer.betas has no effect without optimizer.name=adamw",
    "optimizer.name=adamw optimizer.lr=1e-4 optimizer.momentum=0.5": "optimizer.momentum has no "
    "effect",
    "schedule.name=linear schedule.power=2": "schedule.power has no effect without "
    "schedule.name=poly",
    "eval_dataset.rare_class_sampling=0.1": "eval_dataset.rare_class_sampling: only train_dataset",
    "eval_dataset.max_class_share=0.5": "eval_dataset.max_class_share: only train_dataset has",
    "eval_dataset.shuffle_seed=3": "eval_dataset.shuffle_seed: only train_dataset has this key",
    "recipe_name=mild mild.ema.half_life=3ep": "must have the same unit",
    "hot.ema.half_life=soon": "hot.ema.half_life: 'soon' is not a time",
}


@pytest.mark.parametrize("overrides", WRONG)
def test_invalid_config_gives_a_one_line_error(
    tiny: dict[str, Any], tmp_path: Path, overrides: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    parts = [overrides] if "epochs" in overrides else overrides.split()
    with pytest.raises(ConfigError) as caught:
        resolve(load(str(path), parts))
    message = str(caught.value)
    assert re.search(WRONG[overrides], message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "labels",
    [
        pytest.param({"ignore_background": False, "ignore_label": 3}, id="same label in both"),
        pytest.param({}, id="label 255, always ignored"),
    ],
)
def test_equal_label_settings_of_both_datasets_are_accepted(
    tiny: dict[str, Any], labels: dict[str, Any]
) -> None:
    for section in ("train_dataset", "eval_dataset"):
        tiny[section] |= labels
    tiny["eval_dataset"].setdefault("ignore_label", 255)
    assert resolve(tiny).eval_dataset.ignore_label in (3, 255)
    # An evaluation does not read the training section.
    tiny |= {"is_train": False, "load_path": __file__}
    tiny["train_dataset"]["ignore_background"] = not tiny["train_dataset"].get("ignore_background")
    assert not resolve(tiny).is_train


@pytest.mark.parametrize(
    ("keys", "is_rejected"),
    [
        pytest.param({}, True, id="no checkpoint"),
        pytest.param({"save_folder": "runs/x"}, True, id="save_folder without autoresume"),
        pytest.param({"load_path": __file__}, False, id="load_path"),
        pytest.param({"autoresume": True, "save_folder": "runs/x"}, False, id="autoresume"),
        pytest.param({"is_train": True}, False, id="training run"),
    ],
)
def test_evaluation_without_a_checkpoint_is_rejected(
    tiny: dict[str, Any], keys: dict[str, Any], is_rejected: bool
) -> None:
    config = resolve({**tiny, "is_train": False, **keys})
    if is_rejected:
        with pytest.raises(
            ConfigError, match="is_train=false: an evaluation needs a checkpoint; set"
        ):
            check_evaluates(config)
    else:
        check_evaluates(config)


def test_class_names_in_a_different_order_than_the_data_are_rejected(
    synthetic: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny["data"] = str(lay_out(synthetic, tmp_path / "set", "folders", 12))
    del tiny["model"]["num_classes"]
    for section in ("train_dataset", "eval_dataset"):
        del tiny[section]["path"]
    names = tmp_path / "names.txt"
    tiny["class_names"] = str(names)
    names.write_text("\n".join(f"Klasse {name}" for name in NAMES))
    assert resolve(tiny).class_names == str(names)
    names.write_text("\n".join(reversed(NAMES)))
    with pytest.raises(ClassError, match=r"names.txt: class 0 is plane, but in .*yaml it is sky"):
        resolve(tiny)


def test_dataset_path_may_be_the_inner_ade20k_folder(tiny: dict[str, Any], tmp_path: Path) -> None:
    root = Path(tiny["train_dataset"]["path"], "ADEChallengeData2016")
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["path"] = str(root)
    assert resolve(tiny).train_dataset.path == str(root)
    tiny["train_dataset"]["path"] = str(tmp_path)
    with pytest.raises(ConfigError, match=r"does not contain ADEChallengeData2016/images/training"):
        resolve(tiny)


def test_batch_size_that_does_not_divide_among_ranks_is_rejected(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"train_dataset.batch_size: 4 images .* use 3"):
        resolve(tiny)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("name", "resnet", "is unknown; use deeplabv3, .* mmseg, torchvision, smp, hf, timm"),
        ("name", "smp:", "smp: is unknown; use deeplabv3"),
        (
            "arguments",
            {"a": 1},
            "deeplabv3 does not use this key; set its own keys directly under model",
        ),
    ],
)
def test_invalid_model_keys_are_rejected(
    tiny: dict[str, Any], key: str, value: Any, reason: str
) -> None:
    tiny["model"][key] = value
    with pytest.raises(ConfigError, match=f"model.{key}: .*{reason}"):
        resolve(tiny)
    tiny["model"] |= {"name": "smp:Unet", "arguments": None, "backbone_weights": "./file.pth"}
    with pytest.raises(
        ConfigError, match=r"model.backbone_weights: .*set load_path=./file.pth and"
    ):
        resolve(tiny)
