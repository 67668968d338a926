"""Tests of training/initial_weights.py; integration/test_class_order.py tests complete runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from checkpointing.resume import Start
from checkpointing.weights import Weights
from errors import ClassError, ConfigError
from networks.deeplab import create_network
from segmentation.classes import ClassInfo
from training.config import resolve
from training.initial_weights import load_initial_weights
from training.schema import Config

NAMES = ["a", "b", "c"]
SCORES = "classifier.conv_seg.weight"


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path) -> Config:
    tiny["model"]["num_classes"] = 3
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    return resolve({**tiny, "class_names": str(names)})


def network(classes: int = 3) -> nn.Module:
    return create_network(num_classes=classes, backbone_arch="resnet50", backbone_weights=None)


def make_start(names: list[str] | None, classes: int = 3) -> Start:
    """Return a checkpoint whose classifier rows are 0, 1, 2, ..., with these class names."""
    state = dict(network(classes).state_dict())
    state[SCORES] = torch.arange(classes).float()[:, None, None, None].expand_as(state[SCORES])
    infos = names and [ClassInfo(name, (0, 0, 0)) for name in names]
    return Start("old.pt", Weights(state, classes=infos), None, False)


def rows(network: nn.Module) -> list[float]:
    return network.get_parameter(SCORES)[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a", "b", "c"], [0, 1, 2], id="same classes"),
        pytest.param(["c", "a", "b"], [1, 2, 0], id="different class order"),
        pytest.param(None, [0, 1, 2], id="no class names"),
    ],
)
@pytest.mark.usefixtures("small_network")
def test_classifier_rows_follow_the_class_names(
    config: Config, names: list[str] | None, expected: list[float]
) -> None:
    ours = network()
    load_initial_weights(config, make_start(names), ours)
    assert rows(ours) == expected


@pytest.mark.usefixtures("small_network")
def test_classes_with_new_names_keep_their_initial_weights(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    ours = network()
    before = rows(ours)
    load_initial_weights(config, make_start(["x", "y", "z"]), ours)
    assert rows(ours) == before and "old.pt" in caplog.text
    config.load_classes_by_name = True
    load_initial_weights(config, make_start(["x", "b", "z", "a"], 4), ours)
    assert rows(ours)[:2] == [3, 1] and rows(ours)[2] == before[2]


@pytest.mark.usefixtures("small_network")
def test_evaluation_rejects_a_checkpoint_with_other_classes(config: Config) -> None:
    config.is_train = False
    with pytest.raises(ClassError, match="load_path: "):
        load_initial_weights(config, make_start(["x", "y", "z"]), network())


@pytest.mark.usefixtures("small_network")
def test_loading_by_name_rejects_a_checkpoint_without_class_names(config: Config) -> None:
    config.load_classes_by_name = True
    with pytest.raises(ConfigError, match=r"load_classes_by_name: old\.pt"):
        load_initial_weights(config, make_start(None), network())
