"""Tests of networks/registry.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import predict
from errors import ConfigError, ModelError
from networks.registry import named_network
from tests.support.networks import planted
from training.config import resolve


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        (
            "mmseg:segformer/segformer_b0",
            {},
            "no config or file has this name; did you mean mmseg:segformer/segformer_mit-b",
        ),
        ("mmseg:hrnet/fcn_hr18s_512x512_160k_ade20k", {"backbone": {"x": 1}}, "cannot be built"),
        ("torchvision:fcn_resnet5", {}, "no network has this name; use, for example, fcn_resnet50"),
        ("smp:Unett", {}, "no network has this name; use, for example, Unet"),
        ("timm:convnext_tin", {}, "no network has this name; use, for example, convnext_tiny"),
        ("timm:vit_base_patch32_224", {}, "has no features of stride 4"),
        ("hf:/no/such/folder", {}, "found neither a folder nor a network on the hub"),
        ("no_module:build", {}, "No module named 'no_module'"),
        ("own_networks:nothing", {}, "has no attribute 'nothing'"),
        ("own_networks:no_network", {}, "returns str; it must return an nn.Module"),
        ("own_networks:build", {"height": 2}, "cannot be built: TypeError: .*height"),
    ],
)
def test_unbuildable_network_gives_a_one_line_error(name: str, arguments: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        named_network(name, 3, arguments)
    assert "\n" not in str(caught.value)


def test_error_names_the_missing_package_and_its_install_group(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny["model"] |= {"name": "smp:Unet"}
    with pytest.raises(ConfigError, match="segmentation_models_pytorch; run make install WITH=smp"):
        resolve(tiny)
    with pytest.raises(ModelError, match="needs timm; run make install WITH=timm"):
        named_network("timm:convnext_tiny", 3, {})


def test_malformed_network_arguments_give_an_error(tmp_path: Path) -> None:
    path = planted(tmp_path, "torchvision:lraspp_mobilenet_v3_large", {"mean": "abc"})
    with pytest.raises(ModelError, match="cannot be built: ValueError"):
        predict.Segmenter(path)
