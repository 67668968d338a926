"""Tests of checkpointing/weights.py."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.metrics import MIoU
from safetensors.torch import save_file

from checkpointing.weights import (
    check_checkpoint,
    load_weights,
    save_weights,
)
from errors import WeightsError
from segmentation.classes import load_classes
from tests.support.artifacts import random_network
from tests.support.weights import same

pytestmark = pytest.mark.usefixtures("small_network")


def test_weights_of_a_compiled_submodule_are_loaded(tmp_path: Path):
    state = random_network().state_dict()
    renamed = {key.replace("backbone.", "backbone._orig_mod."): v for key, v in state.items()}
    torch.save(renamed, tmp_path / "weights.pt")
    assert same(load_weights(tmp_path / "weights.pt").state, state)


def test_safetensors_file_round_trips(tmp_path: Path):
    path = tmp_path / "weights.safetensors"
    state = copy.deepcopy(random_network()).to(memory_format=torch.channels_last).state_dict()
    classes = load_classes(None, 12)
    save_weights(
        path, {f"module.{key}": value for key, value in state.items()}, {"a": [1]}, classes, "ema"
    )
    weights = load_weights(path)
    assert weights.which == "ema"
    assert same(weights.state, state)
    assert (weights.config, weights.classes, weights.num_classes) == ({"a": [1]}, classes, 12)
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_old_checkpoint_with_metrics_loads_but_cannot_be_resumed(tmp_path: Path):
    """Composer before 0.13 pickled its metrics, so we load the weights but reject a resume."""
    state = random_network().state_dict()
    renamed = {f"module.{key}": value for key, value in state.items()}
    content = {"state": {"model": renamed, "train_metrics": {"MIoU": MIoU(12)}}}
    torch.save(content, tmp_path / "old.pt")
    assert same(load_weights(tmp_path / "old.pt").state, state)
    with pytest.raises(WeightsError, match=r"contains composer\.metrics\.metrics\.MIoU"):
        check_checkpoint(tmp_path / "old.pt")


def test_old_checkpoint_with_algorithms_stored_by_name_is_loaded(tmp_path: Path):
    """Old versions of Composer stored algorithms by name, and current ones still read them."""
    state = random_network().state_dict()
    algorithms = {"LabelSmoothing": {"smoothing": 0.1}}
    torch.save({"state": {"model": state, "algorithms": algorithms}}, tmp_path / "old.pt")
    assert same(load_weights(tmp_path / "old.pt").state, state)


@pytest.mark.parametrize(
    "extra_state",
    [
        {"algorithms": None},
        {"algorithms": [("EMA", {"ema_started": True})]},
        {"callbacks": None},
        {"callbacks": {"RunRecord": {"classes": "road, sky"}}},
        {"callbacks": {"RunRecord": {"config": "[1]"}}},
    ],
)
def test_checkpoint_with_the_state_of_another_trainer_is_rejected(
    tmp_path: Path, extra_state: dict[str, Any]
):
    path = tmp_path / "other.pt"
    torch.save({"state": {"model": {"fc.weight": torch.zeros(2, 2)}, **extra_state}}, path)
    with pytest.raises(WeightsError, match=r"other\.pt: the weights cannot be read: "):
        load_weights(path)


@pytest.mark.parametrize("config", ["unet", "[1]", '{"model": "unet"}'])
def test_safetensors_file_with_foreign_config_metadata_is_rejected(tmp_path: Path, config: str):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors", {"config": config})
    with pytest.raises(WeightsError, match="the config in the file's metadata"):
        load_weights(tmp_path / "other.safetensors")
