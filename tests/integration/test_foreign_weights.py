"""Weights files of torchvision, segmentation_models_pytorch and transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import export
import predict
from checkpointing.rebuild import build_network
from checkpointing.weights import load_weights
from errors import ClassError, WeightsError
from networks.base import Network
from tests.support.foreign_weights import LRASPP, torchvision_network


def test_predict_and_export_load_torchvision_weights_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, names = tmp_path / "a.pth", tmp_path / "names.txt"
    torch.save(torchvision_network(5).state_dict(), path)
    image = np.zeros((40, 30, 3), np.uint8)
    assert len(predict.Segmenter(path, network=LRASPP).classes) == 5
    names.write_text("a\nb\nc\nd\ne\n")
    segmenter = predict.Segmenter(path, network=LRASPP, classes=str(names), size=32)
    assert [info.name for info in segmenter.classes] == list("abcde")
    assert segmenter(image).shape == (40, 30)
    with pytest.raises(ClassError, match="5"):
        predict.Segmenter(path, network=LRASPP, classes=["a", "b"])
    with pytest.raises(WeightsError, match="with --network"):
        predict.Segmenter(path)
    with pytest.raises(
        WeightsError,
        match=r"do not match the network smp:Unet, because no layer has a row for each class; "
        r".*--network",
    ):
        predict.Segmenter(path, network="smp:Unet")
    out = tmp_path / "own.safetensors"
    command = [str(path), "--to", "safetensors", "--network", LRASPP, "--out", str(out)]
    assert export.main(command) == 0, capsys.readouterr().err
    again = predict.Segmenter(out, size=32)  # The exported file stores the name of its network.
    assert len(again.classes) == 5
    assert np.array_equal(again(image), segmenter(image))


def save_pretrained(folder: Path, network: Any) -> Any:
    network.save_pretrained(folder)
    assert (folder / "config.json").is_file()
    return network.eval()


def test_network_from_smp_weights_file_computes_same_logits(tmp_path: Path) -> None:
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
def test_network_from_transformers_folder_computes_same_logits(tmp_path: Path, name: str) -> None:
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
def test_unrelated_config_json_next_to_weights_is_ignored(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    torch.save(torchvision_network(4).state_dict(), tmp_path / "a.pth")
    assert len(predict.Segmenter(tmp_path / "a.pth", network=LRASPP).classes) == 4
