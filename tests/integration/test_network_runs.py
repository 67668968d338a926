"""Runs of networks other than DeepLabV3+, and weights from other projects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from mmcv.runner import save_checkpoint
from torch import nn

import evaluate
import export
import main
import predict
from checkpointing.partial_load import load_fitting
from checkpointing.rebuild import build_network
from checkpointing.weights import load_weights, save_weights
from errors import ConfigError, WeightsError
from model import deeplabv3
from networks.registry import named_network
from segmentation.classes import load_classes

FASTSCNN = "mmseg:fastscnn/fast_scnn_lr0.12_8x4_160k_cityscapes"
BISENET = "mmseg:bisenetv1/bisenetv1_r18-d32_4x4_1024x1024_160k_cityscapes"


@pytest.fixture(scope="module")
def run(synthetic: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Any]:
    """Train BiSeNet for four steps with recipe `hot`; return config, save folder and trainer."""
    folder = tmp_path_factory.mktemp("run")
    dataset = {"path": synthetic, "base_size": 64, "final_size": 64, "batch_size": 4}
    dataset["num_workers"] = 0
    config = {
        "run_name": "network",
        "recipe_name": "hot",
        "hot": {"max_duration": "4ba", "ema": {"half_life": "2ba", "update_interval": "1ba"}},
        "model": {"name": BISENET, "num_classes": 12, "backbone_weights": None},
        "train_dataset": dict(dataset),
        "eval_dataset": dict(dataset),
        "optimizer": {"lr": 0.01},
        "precision": "fp32",
        "pictures": 1,
        "train_metrics_interval": 2,
        "save_interval": "2ba",
        "save_num_checkpoints_to_keep": -1,
        "save_folder": str(folder),
    }
    config["model"]["arguments"] = {"mean": [100.0] * 3, "std": [50.0] * 3}
    return config, folder, main.main(config)


def test_bisenet_run_logs_auxiliary_loss_and_normalises_images(run: Any) -> None:
    _, _, trainer = run
    assert trainer.state.total_loss_dict["loss/train/auxiliary"] > 0
    transform = (
        trainer.state.train_dataloader
    )  # a DataLoader without the transform, which is in its DataSpec
    assert transform is not None
    spec = trainer.state.evaluators[0].dataloader
    assert spec.microbatch_transforms.mean.flatten().tolist() == [100.0] * 3
    assert trainer.state.model.module.mean == (100.0,) * 3


def test_resume_rejects_other_network_or_network_arguments(run: Any, tmp_path: Path) -> None:
    config, folder, _ = run
    path = str(folder / "latest-rank0.pt")
    other = {**config, "load_path": path, "save_folder": None}
    other["model"] = {**config["model"], "name": "deeplabv3", "arguments": None}
    changed = r"model.name: the config sets deeplabv3, but .* was trained with mmseg:bisenetv1"
    with pytest.raises(ConfigError, match=changed):
        main.main(other)
    other["model"] = {**config["model"], "arguments": {"decode_head": {"channels": 64}}}
    with pytest.raises(
        ConfigError, match=r"model\.arguments: \d+ tensors of this network do not match .*"
    ):
        main.main(other)


def test_checkpoint_is_evaluated_and_exported_without_config(run: Any, tmp_path: Path) -> None:
    _, folder, trainer = run
    path = str(folder / "latest-rank0.pt")
    network = build_network(load_weights(path))
    assert network.mean == (100.0,) * 3
    segmenter = predict.Segmenter(path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = segmenter(image)
    tensor = (torch.from_numpy(image).permute(2, 0, 1)[None].float() - 100) / 50
    with torch.no_grad():
        logits = nn.functional.interpolate(network(tensor), (64, 64), mode="bilinear")
    assert np.mean(expected == logits[0].argmax(0).numpy()) > 0.99

    scores = {}
    for protocol in ("square", "paper"):
        target = tmp_path / "scores.json"
        assert evaluate.main([path, "--protocol", protocol, "--json", str(target)]) == 0
        scores[protocol] = json.loads(target.read_text())["mIoU"]
    expected_miou = float(trainer.state.eval_metric_values["MIoU"])
    assert scores["square"] == pytest.approx(expected_miou, abs=1e-3)

    script = str(tmp_path / "model.ts")
    assert export.main([path, "--to", "torchscript", "--out", script, "--size", "96"]) == 0
    exported, weights = tmp_path / "model.onnx", tmp_path / "model.safetensors"
    assert export.main([path, "--to", "onnx", "--out", str(exported), "--size", "96"]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load(exported).metadata_props}
    assert json.loads(metadata["mean"]) == [100.0] * 3
    assert export.main([path, "--weights-only", "--out", str(weights)]) == 0
    for file in (exported, weights):
        assert np.mean(predict.Segmenter(file)(image) == expected) > 0.99
    assert not any(name.startswith("network.") for name in load_weights(weights).state)


def test_pt2_file_pads_images_of_any_size(tmp_path: Path) -> None:
    """Use a small network, because exporting BiSeNet with symbolic sizes takes ten seconds."""
    name = "own_networks:build"
    network = named_network(name, 3, {"width": 8})
    assert network.size_divisor == 8
    weights, file = tmp_path / "own.safetensors", str(tmp_path / "own.pt2")
    config = {"model": {"name": name, "arguments": network.arguments, "num_classes": 3}}
    save_weights(weights, network.network.state_dict(), config)
    # export.py compares the file with PyTorch at two sizes that are not multiples of 8.
    options = ["--network", name, "--to", "pt2", "--out", file, "--size", "97"]
    assert export.main([str(weights), *options]) == 0


def test_failed_export_gives_one_line_error(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("no such\noperator")

    monkeypatch.setattr("extras.sharing.exporters._export_onnx", fail)
    path = str(run[1] / "latest-rank0.pt")
    assert export.main([path, "--to", "onnx", "--out", str(tmp_path / "m.onnx")]) == 1
    error = capsys.readouterr().err
    expected = f"{BISENET}: --to onnx failed (no such operator); use another format"
    assert f"error: {expected}\n" in error
    assert os.listdir(tmp_path) == []


def mmseg_file(network: Any, path: Path, classes: list[str]) -> None:
    """Write a checkpoint in the format of mmsegmentation."""
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    meta = {"CLASSES": classes, "PALETTE": [[0, 0, 0]] * len(classes), "config": "a = 1"}
    save_checkpoint(network, str(path), optimizer, meta)


def test_mmsegmentation_checkpoint_loads_into_its_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    zoo = named_network(FASTSCNN, 3, {})
    mmseg_file(zoo.network, tmp_path / "zoo.pth", ["sky", "tree", "road"])
    weights = load_weights(tmp_path / "zoo.pth")
    torch.manual_seed(1)
    network = named_network(FASTSCNN, 2, {})
    classes = load_classes(["road", "house"], 2)
    before = network.network.decode_head.conv_seg.weight[1].clone()
    line = load_fitting(network, weights, "zoo.pth", 0.5, classes, 2)
    note = "3 -> 2 classes, 1 loaded by name, the others newly initialised"
    heads = ("decode_head", "auxiliary_head.0", "auxiliary_head.1")
    assert line == "zoo.pth: " + "; ".join(f"{head}.conv_seg: {note}" for head in heads)
    own, theirs = network.network.state_dict(), zoo.network.state_dict()
    assert all(torch.equal(own[n], theirs[n]) for n in own if ".conv_seg." not in n)
    rows = network.network.decode_head.conv_seg.weight
    assert torch.equal(rows[0], theirs["decode_head.conv_seg.weight"][2])
    assert torch.equal(rows[1], before)
    # The file does not contain the name of its network, so the user must give it.
    with pytest.raises(WeightsError, match="do not belong to a DeepLabV3"):
        build_network(weights)
    again = build_network(weights, "zoo.pth", FASTSCNN)
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again(image), zoo.eval()(image))


def test_deeplabv3plus_computes_same_logits_as_mmsegmentation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    name = "mmseg:deeplabv3plus/deeplabv3plus_r50b-d8_512x1024_80k_cityscapes"
    zoo = named_network(name, 3, {})
    mmseg_file(zoo.network, tmp_path / "zoo.pth", ["a", "b", "c"])
    network = deeplabv3(3, "resnet50", sync_bn=False)
    weights = load_weights(tmp_path / "zoo.pth")
    assert load_fitting(network, weights, "zoo.pth", 1.0) is None
    network.upsample = False
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(image), zoo.eval()(image))


def test_torchvision_weights_load_with_any_prefix(tmp_path: Path) -> None:
    name = "torchvision:lraspp_mobilenet_v3_large"
    network, other = named_network(name, 3, {}), named_network(name, 2, {})
    for prefix in ("", "model.", "module."):
        state = {prefix + key: value for key, value in network.network.state_dict().items()}
        torch.save(state, tmp_path / "weights.pth")
        line = load_fitting(other, load_weights(tmp_path / "weights.pth"), "f", 0.5, None, 2)
        layers = ("classifier.low_classifier", "classifier.high_classifier")
        assert line == "f: " + "; ".join(
            f"{layer}: 3 -> 2 classes, newly initialised" for layer in layers
        )
    smp = named_network("smp:Unet", 3, {"encoder_name": "resnet18"})
    with pytest.raises(
        WeightsError, match=r"f: only \d+ of the network's \d+ tensors match, fewer"
    ):
        load_fitting(smp, load_weights(tmp_path / "weights.pth"), "f", 0.5, None, 3)
