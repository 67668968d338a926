"""Files of weights of other projects and libraries, as these write them."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import export
import predict
from checkpointing.rebuild import build_network, complete
from checkpointing.weights import check_checkpoint, load_weights
from errors import ClassError, WeightsError
from networks.base import Network

LRASPP = "torchvision:lraspp_mobilenet_v3_large"
STATE = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
AVERAGED = {"a.weight": torch.zeros(2, 2), "n_averaged": torch.tensor(3)}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({"model_state_dict": STATE, "epoch": 1}, id="PyTorch's tutorial"),
        pytest.param({"net": STATE, "acc": 0.5, "epoch": torch.tensor(3)}, id="net"),
        pytest.param({"model_state": STATE, "optimizer_state": {"step": torch.ones(1)}}, id="more"),
        pytest.param({"model": STATE, "args": argparse.Namespace(out=Path("x"))}, id="torchvision"),
        pytest.param({"state": STATE}, id="state"),
        pytest.param({"my own name": OrderedDict(STATE)}, id="a name of nobody's"),
        pytest.param({"state_dict": STATE, "best": np.float64(0.5), "n": np.int32(3)}, id="NumPy"),
        pytest.param(
            {"net": STATE, "when": np.datetime64("2026"), "s": np.str_("x")}, id="NumPy's"
        ),
        pytest.param(STATE | {"_extra": {"version": torch.ones(1)}}, id="itself"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_are_found_wherever_they_are_in_a_file(
    tmp_path: Path, content: dict[str, Any], legacy: bool
) -> None:
    path = tmp_path / "a.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = load_weights(path)
    assert found.state.keys() == STATE.keys() and found.which == "training"


@pytest.mark.parametrize(
    ("training", "average"),
    [
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
        ("net", "ema"),
        ("weights", "swa_state"),
    ],
)
def test_an_average_beside_the_training_weights(
    tmp_path: Path, training: str, average: str
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in AVERAGED.items()}
    torch.save({training: STATE, average: wrapped}, tmp_path / "a.pt")
    for which, value in (("ema", 0), ("training", 1)):
        found = load_weights(tmp_path / "a.pt", which)
        assert (found.which, found.state.keys()) == (which, STATE.keys())
        assert found.state["a.weight"].eq(value).all() and found.state["a.bias"].eq(1).all()


def test_a_word_that_holds_ema_is_no_average(tmp_path: Path) -> None:
    torch.save({"semantic": STATE, "schema": {"b": torch.ones(1)}}, tmp_path / "a.pt")
    assert load_weights(tmp_path / "a.pt").which == "training"


def test_two_networks_in_a_file_are_not_guessed_about(tmp_path: Path) -> None:
    torch.save({"student": STATE, "teacher": STATE}, tmp_path / "a.pt")
    line = r"a\.pt: .* it holds several networks, student and teacher; save the one"
    with pytest.raises(WeightsError, match=line):
        load_weights(tmp_path / "a.pt")
    torch.save({"deeper": {"state_dict": STATE}}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt: no weights in this file: neither itself nor"):
        load_weights(tmp_path / "a.pt")


def test_numpys_scalars_do_not_stop_a_resume(tmp_path: Path) -> None:
    torch.save({"state": {"model": STATE, "best": np.float32(1)}}, tmp_path / "a.pt")
    check_checkpoint(tmp_path / "a.pt")


def torchvision_network(classes: int) -> nn.Module:
    from torchvision.models import segmentation

    return segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes
    )


def with_auxiliary(classes: int) -> nn.Module:
    from torchvision.models import segmentation

    return segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=classes, aux_loss=True
    )


@pytest.mark.parametrize(
    ("name", "build", "wrap"),
    [
        pytest.param(LRASPP, torchvision_network, dict, id="torchvision"),
        pytest.param(
            LRASPP, torchvision_network, lambda s: {"model_state": s}, id="one level down"
        ),
        pytest.param(
            LRASPP,
            torchvision_network,
            lambda s: {"state_dict": {f"net.core.{k}": v for k, v in s.items()}},
            id="in a module of another name",
        ),
        pytest.param(
            "torchvision:deeplabv3_mobilenet_v3_large", with_auxiliary, dict, id="auxiliary head"
        ),
    ],
)
@pytest.mark.parametrize("classes", [2, 21, 251])
def test_the_number_of_classes_comes_from_the_last_layer(
    tmp_path: Path, name: str, build: Any, wrap: Any, classes: int
) -> None:
    network = build(classes).eval()
    torch.save(wrap(network.state_dict()), tmp_path / "a.pth")
    weights = complete(load_weights(tmp_path / "a.pth"), "a.pth", name)
    assert weights.num_classes == classes
    again = build_network(weights, "a.pth", name)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found, expected = again.network(image)["out"], network(image)["out"]
    assert torch.equal(found, expected)


def test_the_commands_take_torchvisions_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, names = tmp_path / "a.pth", tmp_path / "names.txt"
    torch.save(torchvision_network(5).state_dict(), path)
    photo = np.zeros((40, 30, 3), np.uint8)
    assert len(predict.Segmenter(path, network=LRASPP).classes) == 5
    names.write_text("a\nb\nc\nd\ne\n")
    segmenter = predict.Segmenter(path, network=LRASPP, classes=str(names), size=32)
    assert [info.name for info in segmenter.classes] == list("abcde")
    assert segmenter(photo).shape == (40, 30)
    with pytest.raises(ClassError, match="5"):
        predict.Segmenter(path, network=LRASPP, classes=["a", "b"])
    with pytest.raises(WeightsError, match="--network names another"):
        predict.Segmenter(path)
    with pytest.raises(
        WeightsError, match=r"no layer of its classes, as smp:Unet would; --network"
    ):
        predict.Segmenter(path, network="smp:Unet")
    out = tmp_path / "own.safetensors"
    command = [str(path), "--to", "safetensors", "--network", LRASPP, "--out", str(out)]
    assert export.main(command) == 0, capsys.readouterr().err
    again = predict.Segmenter(out, size=32)  # which says what it is
    assert len(again.classes) == 5
    assert np.array_equal(again(photo), segmenter(photo))


def save_pretrained(folder: Path, network: Any) -> Any:
    network.save_pretrained(folder)
    assert (folder / "config.json").is_file()
    return network.eval()


def test_smps_own_files(tmp_path: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    network = smp.Unet("resnet18", encoder_weights=None, classes=6, decoder_use_norm=False)
    save_pretrained(tmp_path, network)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        weights = load_weights(path)
        built = build_network(weights, str(path), "smp:Unet")
        image = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(built(image), network(image))


def segformer(classes: dict[int, str]) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 1, 1],
        decoder_hidden_size=8,
        id2label=classes,
        label2id={name: index for index, name in classes.items()},
    )
    return transformers.SegformerForSemanticSegmentation(config)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "."])
def test_transformers_own_files(tmp_path: Path, name: str) -> None:
    network = save_pretrained(tmp_path, segformer({0: "road", 1: "traffic light", 2: "sky"}))
    if name == "pytorch_model.bin":
        torch.save(network.state_dict(), tmp_path / name)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_normalize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    segmenter = predict.Segmenter(tmp_path / name, network="hf:segformer", size=64)
    assert [info.name for info in segmenter.classes] == ["road", "traffic light", "sky"]
    built = build_network(load_weights(tmp_path / name), str(tmp_path / name), "hf:segformer")
    assert isinstance(built, Network) and built.mean == (127.5,) * 3
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits: Tensor = network(image).logits
        assert torch.equal(built(image), logits)


@pytest.mark.parametrize("text", ["[]", "{", '{"scale": 3}'])
def test_a_config_of_something_else_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    torch.save(torchvision_network(4).state_dict(), tmp_path / "a.pth")
    assert len(predict.Segmenter(tmp_path / "a.pth", network=LRASPP).classes) == 4


def test_torchvisions_averages_are_read(tmp_path: Path) -> None:
    network = torchvision_network(3)
    average = AveragedModel(network)
    torch.save({"model": network.state_dict(), "model_ema": average.state_dict()}, tmp_path / "a")
    assert load_weights(tmp_path / "a").state.keys() == network.state_dict().keys()
