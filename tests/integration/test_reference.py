"""Functions, arguments and configs of MosaicML's reference example work unchanged."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.models import ComposerClassifier
from omegaconf import OmegaConf

import data
import main
import model
import transforms
from errors import ConfigError
from training.config import resolve

EMPTY = inspect.Parameter.empty
SIZES = {"base_size": 512, "min_resize_scale": 0.5, "max_resize_scale": 2.0, "final_size": 512}
NETWORK = {
    "num_classes": EMPTY,
    "backbone_arch": "resnet101",
    "backbone_weights": None,
    "sync_bn": True,
    "use_plus": True,
}
SIGNATURES: list[tuple[Any, dict[str, Any]]] = [
    (main.main, {"config": EMPTY}),
    (model.deeplabv3, {**NETWORK, "init_fn": None}),
    (
        model.build_composer_deeplabv3,
        {
            **NETWORK,
            "ignore_index": -1,
            "cross_entropy_weight": 1.0,
            "dice_weight": 0.0,
            "init_fn": None,
        },
    ),
    (
        data.build_ade20k_dataspec,
        {
            "path": EMPTY,
            "is_streaming": True,
            "local": "/tmp/mds-cache/mds-ade20k/",
            "batch_size": EMPTY,
            "split": "train",
            "drop_last": True,
            "shuffle": True,
            **SIZES,
            "ignore_background": True,
        },
    ),
    (
        data.ADE20k,
        {
            "datadir": EMPTY,
            "split": "train",
            "both_transforms": None,
            "image_transforms": None,
            "target_transforms": None,
        },
    ),
    (transforms.build_ade20k_transformations, {"split": EMPTY, **SIZES}),
    (data.check_dataloader, {}),
]


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES, ids=lambda x: getattr(x, "__name__", "")
)
def test_functions_keep_arguments_of_reference_example(
    function: Any, expected: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters)[: len(expected)] == list(expected)
    assert {name: parameters[name].default for name in expected} == expected
    # Each additional parameter has a default.
    assert all(
        parameter.default is not EMPTY or parameter.kind is parameter.VAR_KEYWORD
        for name, parameter in parameters.items()
        if name not in expected
    )


def test_streaming_ade20k_keeps_arguments_of_reference_example() -> None:
    parameters = list(inspect.signature(data.StreamingADE20k).parameters)
    assert parameters[:9] == ["remote", "local", "split", "shuffle", *SIZES, "batch_size"]


@pytest.mark.usefixtures("small_network", "no_curves")
@pytest.mark.parametrize("dice_weight", [0.0, 1.25])
def test_model_is_a_composer_classifier(dice_weight: float) -> None:
    built = model.build_composer_deeplabv3(10, "resnet50", dice_weight=dice_weight)
    assert isinstance(built, ComposerClassifier)
    batch = torch.randn(2, 3, 64, 64), torch.randint(0, 10, (2, 64, 64))
    output = built(batch)
    assert output.shape == (2, 10, 64, 64) and output.dtype == torch.float32
    loss = built.loss(output, batch)
    assert set(loss) == {"total", "cross_entropy"} | ({"dice"} if dice_weight else set())
    # Only evaluations compute metrics by default.
    assert built.get_metrics(is_train=True) == {}
    assert set(built.get_metrics(is_train=False)) == {"MIoU", "CrossEntropy"}


def test_check_dataloader_accepts_valid_and_rejects_missing_data(
    synthetic: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("extras.preparation.check_command.SPEED_SECONDS", 0.01)
    monkeypatch.setattr(sys, "argv", ["script.py", synthetic, "--num-classes", "12"])
    data.check_dataloader()
    assert "training would work; no problems found" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["script.py", f"{synthetic}/nowhere"])
    with pytest.raises(SystemExit) as ended:
        data.check_dataloader()
    assert ended.value.code == 1


def test_transforms_of_reference_example_resize_image_and_mask(synthetic: str) -> None:
    built = transforms.build_ade20k_transformations("val", 32, 0.5, 2.0, 32)
    dataset = data.ADE20k(synthetic, "val", *built)
    assert len(dataset) == 6
    image, target = dataset[0]
    assert image.shape == (3, 32, 32) and target.shape == (32, 32)


# The deeplabv3.yaml of the reference example with different paths; empty values are None.
REFERENCE = """
run_name: deeplabv3_ade20k
is_train: true
seed: 17
max_duration: 128ep
device_train_microbatch_size:
model:
  num_classes: 150
  backbone_arch: resnet101
  backbone_weights: IMAGENET1K_V2
  sync_bn: true
  cross_entropy_weight: 0.375
  dice_weight: 1.125
train_dataset: &data
  is_streaming: false
  path: {path}
  local:
  base_size: 512
  min_resize_scale: 0.5
  max_resize_scale: 2.0
  final_size: 512
  ignore_background: true
  batch_size: 128
eval_dataset:
  <<: *data
  drop_last: false
optimizer:
  lr: 0.08
  momentum: 0.9
  weight_decay: 5.0e-5
loggers:
  progress_bar:
recipe_name:
mild:
  max_duration: 25ep
medium:
  max_duration: 90ep
hot:
  max_duration: 240ep
save_folder:
save_interval: 10ep
save_num_checkpoints_to_keep: 1
load_path:
python_log_level:
"""


def test_yaml_of_reference_example_is_accepted_unchanged(synthetic: str) -> None:
    config = resolve(OmegaConf.create(REFERENCE.format(path=synthetic)))
    assert config.device_train_microbatch_size is None
    assert (config.load_path, config.recipe_name, config.save_folder) == (None, None, None)
    assert config.loggers == {"progress_bar": {}}


def test_config_keys_of_older_reference_example_are_translated(
    synthetic: str, tmp_path: Path
) -> None:
    reference = OmegaConf.create(REFERENCE.format(path=synthetic))
    (tmp_path / "latest-rank0.pt").touch()
    changes = {"load_path": f"{tmp_path}/latest-rank{{rank}}.pt", "grad_accum": "auto"}
    config = resolve(OmegaConf.merge(reference, changes, {"model": {"backbone_weights": "none"}}))
    assert config.load_path == f"{tmp_path}/latest-rank0.pt"
    assert config.device_train_microbatch_size == "auto"
    assert config.model.backbone_weights is None
    config = resolve(OmegaConf.merge(reference, {"grad_accum": 3}))
    assert config.device_train_microbatch_size == 43  # a third of 128, rounded up
    with pytest.raises(ConfigError, match=r"grad_accum: 0 is out of range; use .* at least 1"):
        resolve(OmegaConf.merge(reference, {"grad_accum": 0}))


@pytest.mark.usefixtures("small_network", "no_curves")
def test_empty_microbatch_size_uses_the_full_batch(tiny: dict[str, Any]) -> None:
    trainer = main.main({**tiny, "device_train_microbatch_size": None, "max_duration": "1ba"})
    assert trainer.state.device_train_microbatch_size == 4
