"""Tests of networks/smp.py."""

from typing import Any

import pytest
import torch

from errors import ModelError
from networks.libraries import Request
from networks.smp import build


@pytest.fixture(autouse=True)
def smp() -> Any:
    return pytest.importorskip("segmentation_models_pytorch")


def test_smp_network_is_built_with_our_number_of_classes(smp: Any) -> None:
    network = build(Request("smp:FPN", 5, {"encoder_name": "mobilenet_v2"})).eval()
    assert isinstance(network.network, smp.FPN) and network.size_divisor == 32
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 64)).shape[:2] == (1, 5)


def test_pretrained_smp_weights_set_the_input_normalisation(
    smp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_options = {}

    def create(**options: object) -> torch.nn.Module:
        build_options.update(options)
        return torch.nn.Conv2d(3, 5, 1)

    create_network = type("FPN", (smp.FPN,), {"__new__": lambda cls, **options: create(**options)})
    monkeypatch.setattr(smp, "FPN", create_network)
    params = {"input_range": [0, 1], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    monkeypatch.setattr(smp.encoders, "get_preprocessing_params", lambda *_: params)
    network = build(Request("smp:FPN", 5, {"encoder_name": "resnet34"}, "imagenet", False))
    assert build_options["encoder_weights"] == "imagenet" and build_options["classes"] == 5
    assert network.mean == pytest.approx([123.675, 116.28, 103.53])
    assert network.std == pytest.approx([58.395, 57.12, 57.375])
    build(Request("smp:FPN", 5, {"encoder_name": "resnet34"}, "imagenet", True))
    assert build_options["encoder_weights"] is None


def test_unknown_smp_name_is_rejected() -> None:
    with pytest.raises(ModelError, match=r"smp:Unett.*Unet"):
        build(Request("smp:Unett", 5, {}))
