"""Networks of each library train and are rebuilt from checkpoints, which cannot run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import predict
from checkpointing.weights import save_weights
from errors import ModelError, UserError, WeightsError
from model import build_composer_model, deeplabv3
from networks.base import backbone_of
from networks.registry import named_network
from segmentation.losses import MixedTarget
from tests.support.networks import HEAD, hf_folder, planted  # noqa: F401

SEGFORMER = "mmseg:segformer/segformer_mit-b0_512x512_160k_ade20k"


KINDS: list[tuple[str, dict[str, Any] | None]] = [
    (SEGFORMER, {"backbone": {"num_layers": [1, 1, 1, 1]}}),
    ("mmseg:bisenetv1/bisenetv1_r18-d32_4x4_1024x1024_160k_cityscapes", None),
    ("torchvision:lraspp_mobilenet_v3_large", None),
    ("torchvision:fcn_resnet50", {"aux_loss": True}),
    ("smp:Unet", {"encoder_name": "resnet18"}),
    ("hf:FOLDER", None),
    ("timm:convnext_atto", None),
    ("own_networks:build", {"width": 8}),
    ("own_networks:as_mapping", None),
]


@pytest.mark.parametrize(("name", "arguments"), KINDS, ids=[name for name, _ in KINDS])
def test_network_of_each_library_trains_and_is_rebuilt(
    name: str, arguments: dict[str, Any] | None, hf_folder: str
) -> None:
    name = name.replace("FOLDER", hf_folder)
    torch.manual_seed(0)
    model = build_composer_model(name, arguments, num_classes=7, backbone_weights=None)
    network = model.module
    network.check(7, [64])
    batch = torch.randn(2, 3, 72, 64), torch.randint(-1, 7, (2, 72, 64))
    mixed = MixedTarget(batch[1], batch[1].flip(0), 0.25)
    outputs = model.train()(batch)
    loss = model.loss(outputs, (batch[0], mixed))
    loss["total"].backward()
    assert ("auxiliary" in loss) == isinstance(outputs, tuple)
    assert isinstance(outputs, tuple) == (
        "bisenet" in name or bool(arguments and "aux_loss" in arguments)
    )
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    record = json.loads(json.dumps(network.arguments))
    trusted_name = name if name.startswith("own") else None
    again = named_network(name, 7, record, None, True, trusted_name)
    assert again.arguments == network.arguments
    again.load_state_dict(network.state_dict())
    again.to(memory_format=again.memory_format)
    image = torch.randn(1, 3, 72, 64)
    with torch.no_grad():
        expected = model.eval()((image, None))
        assert torch.equal(again.eval()(image), expected)
    assert expected.shape[:2] == (1, 7)
    if network.size_divisor == 32:
        assert expected.shape[2:] == (72, 64)  # the logits are cropped to the size before padding


def test_network_sets_mean_and_std_of_image_normalisation(hf_folder: str) -> None:
    network = named_network("own_networks:build", 3, {})
    assert (network.mean, network.std, network.size_divisor) == ((127.5,) * 3, (127.5,) * 3, 8)
    network = named_network("own_networks:build", 3, {"mean": [1, 2, 3], "size_divisor": 4})
    assert (network.mean, network.std, network.size_divisor) == ((1, 2, 3), (127.5,) * 3, 4)
    network = named_network(f"hf:{hf_folder}", 3, {})
    assert (network.mean, network.std) == ((127.5,) * 3, (63.75,) * 3)


def test_backbone_is_found_in_networks_of_each_library(hf_folder: str) -> None:
    for name, _ in KINDS:
        if not name.startswith("own"):
            network = named_network(name.replace("FOLDER", hf_folder), 3, {})
            part = backbone_of(network)
            assert part is not None
            share = sum(p.numel() for p in part.parameters()) / sum(
                p.numel() for p in network.parameters()
            )
            assert 0.1 < share < 1, name
    assert backbone_of(named_network("own_networks:build", 3, {})) is None
    assert backbone_of(deeplabv3(3, "resnet50")) is not None


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("os:system", {"command": "touch marker"}),
        ("subprocess:call", {"args": ["touch", "marker"]}),
        ("mmseg:config.py", {}),
        ("mmseg:segformer/segformer_mit-b0_512x512_160k_ade20k", {}),
        ("hf:someone/something", {}),
        ("smp:Unet", {"encoder_name": "tu-hf_hub:someone/something"}),
        ("smp:Unet", {"encoder_name": "tu-hf-hub:someone"}),
        ("timm:hf-hub:someone", {}),
        ("timm:local-dir:.", {}),
        ("torchvision:raft_large", {}),
        ("mmseg:x", {"config": {"type": "os.system", "command": "touch marker"}}),
        (
            "mmseg:x",
            {
                "config": {
                    "type": "EncoderDecoder",
                    "backbone": {"type": "MobileNetV2"},
                    "decode_head": {
                        **HEAD,
                        "loss_decode": {"type": "CrossEntropyLoss", "x": "http://a/b.pkl"},
                    },
                }
            },
        ),
        ("hf:x", {"config": {"model_type": "none", "auto_map": {"AutoConfig": "code.Config"}}}),
        ("hf:x", {"config": {"model_type": "upernet", "backbone": "someone/something"}}),
    ],
)
def test_weights_file_cannot_run_code_or_download(
    tmp_path: Path, name: str, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("open('marker', 'w')")
    called = []
    monkeypatch.setattr("socket.create_connection", lambda *a, **k: called.append(a))
    monkeypatch.setattr("socket.getaddrinfo", lambda *a, **k: called.append(a))
    path = planted(tmp_path, name, arguments)
    with pytest.raises(UserError) as caught:
        predict.Segmenter(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists() and not called


def test_network_function_in_weights_file_needs_network_option(tmp_path: Path) -> None:
    network = named_network("own_networks:build", 3, {"width": 8})
    config = {
        "model": {"name": network.name, "arguments": network.arguments, "num_classes": 3},
    }
    path = tmp_path / "own.safetensors"
    save_weights(path, network.network.state_dict(), config)
    with pytest.raises(
        ModelError,
        match=r"the function own_networks:build builds .* --network own_networks:build",
    ):
        predict.Segmenter(path)
    with pytest.raises(
        WeightsError, match="the network in the file is own_networks:build, not smp:Unet"
    ):
        predict.Segmenter(path, network="smp:Unet")
    image = np.zeros((40, 30, 3), np.uint8)
    segmenter = predict.Segmenter(path, network="own_networks:build", size=32, slide=True)
    assert segmenter(image).shape == (40, 30)


def test_error_of_fixed_size_network_suggests_slide_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = named_network("own_networks:fixed", 3, {})
    model = {"name": network.name, "arguments": network.arguments, "num_classes": 3}
    path, image = str(tmp_path / "fixed.safetensors"), str(tmp_path / "image.png")
    save_weights(path, network.network.state_dict(), {"model": model})
    Image.new("RGB", (96, 64)).save(image)
    arguments = [path, image, "--network", network.name, "--size", "64", "--out", str(tmp_path)]
    assert predict.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.endswith(
        "error: own_networks:fixed fails on images of 96 x 64 pixels (not 64 pixels); "
        "use --slide --size N to process squares of N pixels\n"
    )
    assert predict.main([*arguments, "--slide"]) == 0
