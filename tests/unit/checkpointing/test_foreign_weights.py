"""Tests of checkpointing/foreign_weights.py."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from checkpointing.weights import check_checkpoint, load_weights
from errors import WeightsError
from tests.support.foreign_weights import torchvision_network

STATE = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
AVERAGED = {"a.weight": torch.zeros(2, 2), "n_averaged": torch.tensor(3)}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"model_state_dict": STATE, "epoch": 1}, id="PyTorch tutorial"),
        pytest.param({"net": STATE, "acc": 0.5, "epoch": torch.tensor(3)}, id="key net"),
        pytest.param(
            {"model_state": STATE, "optimizer_state": {"step": torch.ones(1)}}, id="optimizer state"
        ),
        pytest.param({"model": STATE, "args": argparse.Namespace(out=Path("x"))}, id="torchvision"),
        pytest.param({"state": STATE}, id="key state"),
        pytest.param({"my own name": OrderedDict(STATE)}, id="key with any name"),
        pytest.param(
            {"state_dict": STATE, "best": np.float64(0.5), "n": np.int32(3)}, id="NumPy scalars"
        ),
        pytest.param(
            {"net": STATE, "when": np.datetime64("2026"), "s": np.str_("x")},
            id="NumPy date and string",
        ),
        pytest.param(STATE | {"_extra": {"version": torch.ones(1)}}, id="plain state dict"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_in_checkpoints_of_other_projects(
    tmp_path: Path, content: dict[str, Any], legacy: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    weights = load_weights(path)
    assert weights.state.keys() == STATE.keys() and weights.which == "training"


@pytest.mark.parametrize(
    ("training", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("net", "ema"),
        ("weights", "swa_state"),
    ],
)
def test_averaged_weights_are_found_beside_training_weights(
    tmp_path: Path, training: str, average: str
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in AVERAGED.items()}
    torch.save({training: STATE, average: wrapped}, tmp_path / "a.pt")
    for which, value in (("ema", 0), ("training", 1)):
        weights = load_weights(tmp_path / "a.pt", which)
        assert (weights.which, weights.state.keys()) == (which, STATE.keys())
        assert weights.state["a.weight"].eq(value).all() and weights.state["a.bias"].eq(1).all()


def test_keys_with_ema_inside_a_word_are_not_averaged_weights(tmp_path: Path) -> None:
    torch.save({"semantic": STATE, "schema": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").which == "training"


def test_file_with_two_networks_is_rejected(tmp_path: Path) -> None:
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "a.pt")
    line = r"a\.pt: .* the file contains several networks \(student and teacher\); save the"
    with pytest.raises(WeightsError, match=line):
        load_weights(tmp_path / "a.pt")
    torch.save({"deeper": {"state_dict": STATE}}, tmp_path / "a.pt")
    with pytest.raises(
        WeightsError, match=r"a\.pt: the file contains no weights; choose a file that"
    ):
        load_weights(tmp_path / "a.pt")


def test_checkpoint_with_numpy_scalars_can_be_resumed(tmp_path: Path) -> None:
    torch.save({"state": {"model": STATE, "best": np.float32(1)}}, tmp_path / "a.pt")
    check_checkpoint(tmp_path / "a.pt")


def test_torchvision_ema_weights_are_loaded(tmp_path: Path) -> None:
    network = torchvision_network(3)
    average = AveragedModel(network)
    torch.save({"model": network.state_dict(), "model_ema": average.state_dict()}, tmp_path / "a")
    assert load_weights(tmp_path / "a").state.keys() == network.state_dict().keys()
