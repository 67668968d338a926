"""Tests of networks/libraries.py."""

from typing import Any

import pytest
from torch import nn

from errors import ModelError
from networks.libraries import (
    Request,
    fetch,
    foreign_arguments,
    own_network,
    plain,
    require,
    unknown,
)


def test_only_arguments_that_load_weights_are_removed() -> None:
    arguments_in_file = {
        "hidden": 8,
        "pretrained": "imagenet",
        "backbone": {"use_pretrained_backbone": True, "sizes": [1, 2], "name": "resnet-18.a1"},
        "encoder_weights": "x",
    }
    expected = {"hidden": 8, "backbone": {"sizes": [1, 2], "name": "resnet-18.a1"}}
    assert plain(arguments_in_file, "file.pt") == expected


@pytest.mark.parametrize("value", ["/etc/passwd", "http://host/x", "a b", "~/x", "nvidia/mit-b0"])
def test_paths_and_urls_in_network_arguments_are_rejected(value: str) -> None:
    with pytest.raises(ModelError, match=r"file\.pt: rejected, because a\.b is"):
        plain({"a": {"b": [value]}}, "file.pt")


@pytest.mark.parametrize(
    ("network", "config", "state", "expected"),
    [
        pytest.param("smp:Unet", {"encoder_name": "resnet18", "classes": 3, "_x": 1}, [],
                     ({"encoder_name": "resnet18"}, "smp:Unet"), id="smp"),
        pytest.param("hf:any", {"model_type": "segformer"}, [], ({}, "hf:FOLDER"), id="hf"),
        pytest.param("torchvision:fcn_resnet50", {}, ["aux_classifier.0.weight"],
                     ({"aux_loss": True}, "torchvision:fcn_resnet50"), id="torchvision, auxiliary"),
        pytest.param("torchvision:fcn_resnet50", {}, ["classifier.0.weight"],
                     ({}, "torchvision:fcn_resnet50"), id="torchvision"),
        pytest.param("mmseg:pspnet", {"model_type": "x"}, [], ({}, "mmseg:pspnet"), id="mmseg"),
    ],
)  # fmt: skip
def test_arguments_are_read_from_a_library_checkpoint(
    tmp_path: Any, network: str, config: dict[str, Any], state: list[str], expected: Any
) -> None:
    actual = foreign_arguments(network, config, state, str(tmp_path))
    assert actual == (expected[0], expected[1].replace("FOLDER", str(tmp_path)))


def test_error_for_an_unknown_network_suggests_a_similar_name() -> None:
    error = unknown(Request("smp:Unett", 3, {}), ["FPN", "Unet", "Linknet"])
    assert str(error).startswith("model.name=smp:Unett: ") and "Unet" in str(error)


def test_error_names_the_missing_package_and_its_install_group() -> None:
    with pytest.raises(ModelError, match="needs not_installed; run make install WITH=group"):
        require("not_installed", "group:y")
    assert require("json", "x:y").loads("1") == 1


def test_failed_download_gives_a_one_line_error() -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError("no\nsuch network")

    with pytest.raises(ModelError) as error:
        fetch("hf:a/b", fail)
    assert "model.name=hf:a/b" in str(error.value) and "\n" not in str(error.value)


def test_arguments_are_divided_between_the_library_and_the_wrapper() -> None:
    own = {"mean": [0], "std": [1], "size_divisor": 32, "channels_last": False}
    request = Request("smp:Unet", 3, {**own, "depth": 3})
    assert request.library_arguments == {"depth": 3} and request.wrapper_arguments == own


@pytest.mark.parametrize("arguments", [{}, {"config": None}])
def test_file_without_a_config_is_rejected(arguments: dict[str, Any]) -> None:
    assert Request("hf:x", 3, arguments).recorded_config() is None
    with pytest.raises(ModelError, match="hf:x: the file does not contain the network's config"):
        Request("hf:x", 3, arguments, from_file=True).recorded_config()


def small(num_classes: int, **arguments: Any) -> nn.Module:
    network = nn.Conv2d(3, num_classes, 1, **arguments)
    network.size_divisor = 4  # type: ignore[assignment]
    return network


def not_a_module(num_classes: int) -> int:
    return num_classes


def test_user_function_builds_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import ModuleType

    module = ModuleType("users_networks")
    module.small, module.not_a_module = small, not_a_module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "users_networks", module)
    network = own_network(Request("users_networks:small", 5, {"bias": False}))
    assert network.network.weight.shape[0] == 5 and network.network.bias is None
    assert network.size_divisor == 4
    with pytest.raises(ModelError, match="users_networks:not_a_module returns int"):
        own_network(Request("users_networks:not_a_module", 5, {}))
    with pytest.raises(ModelError, match="users_networks:missing"):
        own_network(Request("users_networks:missing", 5, {}))
