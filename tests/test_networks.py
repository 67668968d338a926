"""Networks by name: each kind trains, is recorded and built again; a file has no code run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import predict
from checkpointing.partial_load import load_fitting
from checkpointing.weights import load_weights, save_weights
from errors import ConfigError, ModelError, UserError, WeightsError
from model import build_composer_model, deeplabv3
from networks.base import Network, backbone_of, current_names
from networks.registry import named_network
from segmentation.losses import MixedTarget
from training.config import resolve

pytestmark = pytest.mark.trains

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
SEGFORMER = "mmseg:segformer/segformer_mit-b0_512x512_160k_ade20k"


@pytest.fixture(scope="module", autouse=True)
def own_module(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_networks.py").write_text(MODULE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder as transformers' save_pretrained writes it, of a small SegFormer."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    folder = tmp_path_factory.mktemp("hf")
    config = SegformerConfig(
        hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=5
    )
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return str(folder)


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
def test_each_kind_takes_a_step_and_is_built_again_from_its_record(
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
    vouched = name if name.startswith("own") else None
    again = named_network(name, 7, record, None, True, vouched)
    assert again.arguments == network.arguments
    again.load_state_dict(network.state_dict())
    again.to(memory_format=again.memory_format)
    image = torch.randn(1, 3, 72, 64)
    with torch.no_grad():
        expected = model.eval()((image, None))
        assert torch.equal(again.eval()(image), expected)
    assert expected.shape[:2] == (1, 7)
    if network.size_divisor == 32:
        assert expected.shape[2:] == (72, 64)  # it was padded


def test_a_network_says_how_its_photos_are_normalised(hf_folder: str) -> None:
    network = named_network("own_networks:build", 3, {})
    assert (network.mean, network.std, network.size_divisor) == ((127.5,) * 3, (127.5,) * 3, 8)
    network = named_network("own_networks:build", 3, {"mean": [1, 2, 3], "size_divisor": 4})
    assert (network.mean, network.std, network.size_divisor) == ((1, 2, 3), (127.5,) * 3, 4)
    network = named_network(f"hf:{hf_folder}", 3, {})
    assert (network.mean, network.std) == ((127.5,) * 3, (63.75,) * 3)


def test_hf_weights_of_a_folder_are_loaded_and_the_classes_left_new(hf_folder: str) -> None:
    network = named_network(f"hf:{hf_folder}", 3, {}, "any")
    # transformers writes the names of its version 4.
    saved = current_names(network, load_weights(Path(hf_folder, "model.safetensors")).state)
    own = network.network.state_dict()
    differ = [name for name in own if own[name].shape != saved[name].shape]
    assert differ == ["decode_head.classifier.weight", "decode_head.classifier.bias"]
    assert all(torch.equal(own[name], saved[name]) for name in own if name not in differ)


def test_hf_weights_of_transformers_4_fit(hf_folder: str) -> None:
    """Its names are those that save_pretrained still writes."""
    weights = load_weights(Path(hf_folder, "model.safetensors"))
    network = named_network(f"hf:{hf_folder}", 5, {})
    if weights.state.keys() == network.network.state_dict().keys():
        pytest.skip("this version of transformers has the names of version 4")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert load_fitting(network, weights, "file", least=1.0, num_classes=5) is None
    assert all(p.abs().sum() > 0 for p in network.parameters() if p.ndim > 1)


def test_every_kind_has_a_backbone(hf_folder: str) -> None:
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
    ("name", "arguments", "reason"),
    [
        (
            "mmseg:segformer/segformer_b0",
            {},
            "no such config, .* near is segformer/segformer_mit-b",
        ),
        ("mmseg:hrnet/fcn_hr18s_512x512_160k_ade20k", {"backbone": {"x": 1}}, "cannot be built"),
        ("torchvision:fcn_resnet5", {}, "no such network; there is fcn_resnet50"),
        ("smp:Unett", {}, "no such network; there is Unet"),
        ("timm:convnext_tin", {}, "no such network; there is convnext_tiny"),
        ("timm:vit_tiny_patch16_224", {}, "has no features of stride 4"),
        ("hf:/no/such/folder", {}, "neither a folder nor to be had from the hub"),
        ("no_module:build", {}, "No module named 'no_module'"),
        ("own_networks:nothing", {}, "has no attribute 'nothing'"),
        ("own_networks:no_network", {}, "returns str, not an nn.Module"),
        ("own_networks:build", {"height": 2}, "cannot be built: TypeError: .*height"),
    ],
)
def test_what_cannot_be_built_is_one_line(name: str, arguments: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        named_network(name, 3, arguments)
    assert "\n" not in str(caught.value)


def test_the_contract_is_checked() -> None:
    with pytest.raises(
        ModelError, match=r"gives \(2, 4, 32, 32\) for two photos, not logits \(2, 3"
    ):
        named_network("own_networks:wrong", 3, {}).check(3, [32])
    network = Network(nn.Conv2d(4, 3, 1), "own:x", {})
    with pytest.raises(ModelError, match=r"own:x fails on photos of 32 x 32 pixels: .*4 channels"):
        network.check(3, [32])
    network = Network(nn.MaxPool2d(2, return_indices=True), "own:x", {})
    network.register_parameter("w", nn.Parameter(torch.zeros(1)))
    with pytest.raises(ModelError, match="gives tuple; the logits should come as"):
        network.check(3, [32])

    class Viewing(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image.view(image.shape[0], -1).view(image.shape))

    network = Network(Viewing(3, 3, 1), "own:x", {})
    network.check(3, [32])
    assert network.arguments["channels_last"] is False


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("name", "resnet", "neither deeplabv3 nor one of mmseg, torchvision, smp, hf, timm"),
        ("name", "smp:", "neither deeplabv3"),
        ("arguments", {"a": 1}, "deeplabv3 has none"),
    ],
)
def test_wrong_keys(tiny: dict[str, Any], key: str, value: Any, reason: str) -> None:
    tiny["model"][key] = value
    with pytest.raises(ConfigError, match=f"model.{key}: .*{reason}"):
        resolve(tiny)
    tiny["model"] |= {"name": "smp:Unet", "arguments": None, "backbone_weights": "./file.pth"}
    with pytest.raises(ConfigError, match=r"model.backbone_weights: ./file.pth is for deeplabv3"):
        resolve(tiny)


def test_a_missing_package_names_its_group(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny["model"] |= {"name": "smp:Unet"}
    with pytest.raises(ConfigError, match="segmentation_models_pytorch; make install WITH=smp"):
        resolve(tiny)
    with pytest.raises(ModelError, match="needs timm; make install WITH=timm"):
        named_network("timm:convnext_tiny", 3, {})


# A file has no code run.


def planted(tmp_path: Path, name: str, arguments: dict[str, Any]) -> str:
    """A file of weights that names a network."""
    path = tmp_path / "planted.safetensors"
    config = {"model": {"name": name, "arguments": arguments, "num_classes": 3}}
    save_weights(path, {"a.weight": torch.zeros(3)}, config)
    return str(path)


HEAD = {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_classes": 3}


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
def test_a_file_runs_no_code_and_loads_nothing(
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


def test_a_function_is_called_where_the_user_names_it_too(tmp_path: Path) -> None:
    network = named_network("own_networks:build", 3, {"width": 8})
    config = {
        "model": {"name": network.name, "arguments": network.arguments, "num_classes": 3},
    }
    path = tmp_path / "own.safetensors"
    save_weights(path, network.network.state_dict(), config)
    with pytest.raises(ModelError, match=r"names a function, .* --network own_networks:build"):
        predict.Segmenter(path)
    with pytest.raises(WeightsError, match="its network is own_networks:build, not smp:Unet"):
        predict.Segmenter(path, network="smp:Unet")
    photo = np.zeros((40, 30, 3), np.uint8)
    segmenter = predict.Segmenter(path, network="own_networks:build", size=32, slide=True)
    assert segmenter(photo).shape == (40, 30)


def test_a_network_of_one_size_says_so_and_takes_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = named_network("own_networks:fixed", 3, {})
    model = {"name": network.name, "arguments": network.arguments, "num_classes": 3}
    path, photo = str(tmp_path / "fixed.safetensors"), str(tmp_path / "photo.png")
    save_weights(path, network.network.state_dict(), {"model": model})
    Image.new("RGB", (96, 64)).save(photo)
    arguments = [path, photo, "--network", network.name, "--size", "64", "--out", str(tmp_path)]
    assert predict.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "error: own_networks:fixed fails on photos of 96 x 64 pixels: not 64 pixels; "
        "--slide --size N sends it squares of N\n"
    )
    assert predict.main([*arguments, "--slide"]) == 0


def test_a_malformed_record_is_one_line(tmp_path: Path) -> None:
    path = planted(tmp_path, "torchvision:lraspp_mobilenet_v3_large", {"mean": "abc"})
    with pytest.raises(ModelError, match="cannot be built: ValueError"):
        predict.Segmenter(path)
