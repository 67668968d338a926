"""Tests of networks/mmseg.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from networks.registry import named_network
from tests.support.networks import HEAD

MODULE = """
from torch import nn


def build(num_classes, width=4):
    network = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, num_classes, 1))
    network.mean, network.std, network.size_divisor = (127.5,) * 3, (127.5,) * 3, 8
    return network


def as_mapping(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            return {"out": super().forward(image)}

    return Network(3, num_classes, 1)


def fixed(num_classes):
    class Network(nn.Conv2d):
        def forward(self, image):
            assert image.shape[2:] == (64, 64), "not 64 pixels"
            return super().forward(image)

    return Network(3, num_classes, 1)


def no_network(num_classes):
    return "a network"


def wrong(num_classes):
    return nn.Conv2d(3, num_classes + 1, 1)
"""


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def test_class_weights_by_path_are_never_read(tmp_path: Path) -> None:
    """mmcv would unpickle such a file, or fetch it."""
    loss = {"type": "CrossEntropyLoss", "class_weight": "weights.pkl"}
    head = {**HEAD, "in_channels": 1280, "in_index": 6, "loss_decode": loss}
    config = {"type": "EncoderDecoder", "backbone": {"type": "MobileNetV2"}, "decode_head": head}
    network = named_network("mmseg:x", 3, {"config": config}, None, True)
    assert "weights.pkl" not in json.dumps(network.arguments)


def test_pretrained_weights_that_a_file_names_are_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = []
    for place in ("torch.hub.load_state_dict_from_url", "timm.models._builder.load_pretrained"):
        monkeypatch.setattr(place, lambda *args, **kwargs: called.append(args))
    head = {**HEAD, "in_channels": 512, "in_index": 4}
    backbone = {"type": "TIMMBackbone", "model_name": "resnet18", "features_only": True}
    mmseg = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": head}
    timm = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    upernet = {"model_type": "upernet", "backbone_config": timm, "hidden_size": 8}
    upernet |= {"auxiliary_in_channels": 256, "auxiliary_channels": 8}
    weights = {"weights_backbone": "IMAGENET1K_V1", "weights": "DEFAULT"}
    named_network("torchvision:lraspp_mobilenet_v3_large", 3, weights, None, True)
    named_network("smp:Unet", 3, {"encoder_weights": "imagenet"}, None, True)
    named_network("timm:convnext_atto", 3, {"pretrained": True}, None, True)
    named_network("mmseg:x", 3, {"config": mmseg}, None, True)
    named_network("hf:x", 3, {"config": upernet}, None, True)
    assert not called
    named_network("timm:convnext_atto", 3, {"pretrained": True})
    assert called  # what was replaced is what loads
