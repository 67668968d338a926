"""Tests of networks/mmseg.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from networks.registry import named_network
from tests.support.networks import HEAD


def test_class_weight_files_are_never_read(tmp_path: Path) -> None:
    """mmcv would unpickle or download a class weight file that a config names."""
    loss = {"type": "CrossEntropyLoss", "class_weight": "weights.pkl"}
    head = {**HEAD, "in_channels": 1280, "in_index": 6, "loss_decode": loss}
    config = {"type": "EncoderDecoder", "backbone": {"type": "MobileNetV2"}, "decode_head": head}
    network = named_network("mmseg:x", 3, {"config": config}, None, True)
    assert "weights.pkl" not in json.dumps(network.arguments)


def test_pretrained_weights_named_in_a_checkpoint_are_not_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    for place in ("torch.hub.load_state_dict_from_url", "timm.models._builder.load_pretrained"):
        monkeypatch.setattr(place, lambda *args, **kwargs: calls.append(args))
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
    assert not calls
    named_network("timm:convnext_atto", 3, {"pretrained": True})
    # A network that is not from a checkpoint does load its weights.
    assert calls
