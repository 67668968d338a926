"""Tests of networks/mmseg.py."""

from __future__ import annotations

import json
from pathlib import Path

from networks.registry import named_network
from tests.support.networks import HEAD


def test_class_weight_files_are_never_read(tmp_path: Path) -> None:
    """mmcv would unpickle or download a class weight file that a config names."""
    loss = {"type": "CrossEntropyLoss", "class_weight": "weights.pkl"}
    head = {**HEAD, "in_channels": 1280, "in_index": 6, "loss_decode": loss}
    config = {"type": "EncoderDecoder", "backbone": {"type": "MobileNetV2"}, "decode_head": head}
    network = named_network("mmseg:x", 3, {"config": config}, None, True)
    assert "weights.pkl" not in json.dumps(network.arguments)
