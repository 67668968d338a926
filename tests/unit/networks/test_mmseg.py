"""Tests of networks/mmseg.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import ModelError
from networks import mmseg
from networks.registry import named_network
from tests.support.networks import HEAD


def test_class_weight_files_are_never_read(tmp_path: Path) -> None:
    """mmcv would unpickle or download a class weight file that a config names."""
    loss = {"type": "CrossEntropyLoss", "class_weight": "weights.pkl"}
    head = {**HEAD, "in_channels": 1280, "in_index": 6, "loss_decode": loss}
    config = {"type": "EncoderDecoder", "backbone": {"type": "MobileNetV2"}, "decode_head": head}
    network = named_network("mmseg:x", 3, {"config": config}, None, True)
    assert "weights.pkl" not in json.dumps(network.arguments)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        pytest.param("optimizer = dict(type='SGD')", "does not define a model", id="no model"),
        pytest.param(
            "model = dict(type='EncoderDecoder')\nimg_norm_cfg = dict(to_rgb=False)",
            "the network expects BGR images, but this project uses RGB",
            id="BGR",
        ),
    ],
)
def test_config_without_a_usable_model_is_rejected(tmp_path: Path, content: str, line: str) -> None:
    (tmp_path / "own.py").write_text(content)
    with pytest.raises(ModelError, match=line):
        named_network(f"mmseg:{tmp_path}/own.py", 3, {})


def test_changes_of_a_config_are_merged() -> None:
    model = {"head": {"channels": 8, "dilations": (1, 6)}, "neck": {"type": "FPN"}}
    changes = {"head": {"dilations": [1, 12]}, "neck": None}
    changed = {"head": {"channels": 8, "dilations": (1, 12)}, "neck": None}
    assert mmseg._changed(model, changes) == changed


def test_pretrained_weights_that_cannot_be_loaded_give_a_one_line_error() -> None:
    class Unreachable:
        def init_weights(self) -> None:
            raise OSError("no network\nconnection")

    line = "model.name=x: its pretrained weights cannot be loaded .no network connection.; to start"
    with pytest.raises(ModelError, match=line):
        mmseg._initialise("x", Unreachable())
