"""Tests of networks/torchvision.py."""

import pytest
import torch

from errors import ModelError
from networks.libraries import Request
from networks.torchvision import build


def test_torchvision_network_is_built_with_our_number_of_classes() -> None:
    network = build(Request("torchvision:lraspp_mobilenet_v3_large", 5, {})).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 32, 32)).shape[:2] == (1, 5)
    assert type(network.network).__name__ == "LRASPP"


def test_unknown_torchvision_name_is_rejected() -> None:
    with pytest.raises(ModelError, match="torchvision:lrasp"):
        build(Request("torchvision:lrasp", 5, {}))


def test_weights_named_in_a_checkpoint_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a file must not download weights")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    arguments = {"weights_backbone": "IMAGENET1K_V1"}
    name = "torchvision:lraspp_mobilenet_v3_large"
    build(Request(name, 5, arguments, "IMAGENET1K_V1", True))
