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
        pytest.param({"model_state_dict": STATE, "epoch": 1}, id="PyTorch's tutorial"),
        pytest.param({"net": STATE, "acc": 0.5, "epoch": torch.tensor(3)}, id="net"),
        pytest.param({"model_state": STATE, "optimizer_state": {"step": torch.ones(1)}}, id="more"),
        pytest.param({"model": STATE, "args": argparse.Namespace(out=Path("x"))}, id="torchvision"),
        pytest.param({"state": STATE}, id="state"),
        pytest.param({"my own name": OrderedDict(STATE)}, id="a name of nobody's"),
        pytest.param({"state_dict": STATE, "best": np.float64(0.5), "n": np.int32(3)}, id="NumPy"),
        pytest.param(
            {"net": STATE, "when": np.datetime64("2026"), "s": np.str_("x")}, id="NumPy's"
        ),
        pytest.param(STATE | {"_extra": {"version": torch.ones(1)}}, id="itself"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_wherever_they_are_in_a_file(
    tmp_path: Path, content: dict[str, Any], legacy: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = load_weights(path)
    assert found.state.keys() == STATE.keys() and found.which == "training"


@pytest.mark.parametrize(
    ("training", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("net", "ema"),
        ("weights", "swa_state"),
    ],
)
def test_an_average_beside_the_training_weights(
    tmp_path: Path, training: str, average: str
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in AVERAGED.items()}
    torch.save({training: STATE, average: wrapped}, tmp_path / "a.pt")
    for which, value in (("ema", 0), ("training", 1)):
        found = load_weights(tmp_path / "a.pt", which)
        assert (found.which, found.state.keys()) == (which, STATE.keys())
        assert found.state["a.weight"].eq(value).all() and found.state["a.bias"].eq(1).all()


def test_a_word_that_holds_ema_is_no_average(tmp_path: Path) -> None:
    torch.save({"semantic": STATE, "schema": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").which == "training"


def test_two_networks_in_a_file_are_not_guessed_about(tmp_path: Path) -> None:
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "a.pt")
    line = r"a\.pt: .* the file contains several networks \(student and teacher\); save the"
    with pytest.raises(WeightsError, match=line):
        load_weights(tmp_path / "a.pt")
    torch.save({"deeper": {"state_dict": STATE}}, tmp_path / "a.pt")
    with pytest.raises(
        WeightsError, match=r"a\.pt: the file contains no weights; choose a file that"
    ):
        load_weights(tmp_path / "a.pt")


def test_numpys_scalars_do_not_stop_a_resume(tmp_path: Path) -> None:
    torch.save({"state": {"model": STATE, "best": np.float32(1)}}, tmp_path / "a.pt")
    check_checkpoint(tmp_path / "a.pt")


def test_torchvisions_averages_are_read(tmp_path: Path) -> None:
    network = torchvision_network(3)
    average = AveragedModel(network)
    torch.save({"model": network.state_dict(), "model_ema": average.state_dict()}, tmp_path / "a")
    assert load_weights(tmp_path / "a").state.keys() == network.state_dict().keys()
