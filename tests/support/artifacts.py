"""A random network, its weights file and a finished run, all cached for the test session.

Each is made at most twice: once with ResNet-50, and once with the `small_network` fixture active.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torchvision.models import resnet

from checkpointing.weights import save_weights
from extras.preparation.synthetic import TEXTURES, make
from model import DeepLabV3, deeplabv3
from segmentation.classes import load_classes
from tests.support.paths import ROOT

CLASSES = list(TEXTURES)
Result = TypeVar("Result")
_folder = tempfile.TemporaryDirectory()


def _once_per_network(make: Callable[[str], Result]) -> Callable[[], Result]:
    """Cache one result of `make` for ResNet-50 and one for the network of `small_network`."""
    cached = functools.cache(make)
    return functools.wraps(make)(lambda: cached(resnet.resnet50.__name__))


@_once_per_network
def random_network(network_name: str) -> DeepLabV3:
    """Return a network with random weights that predicts several classes within an image."""
    torch.manual_seed(0)
    network = deeplabv3(12, "resnet50", sync_bn=False)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # set the running statistics to those of the forward pass below
    image = torch.randn(2, 3, 48, 48).cumsum(2).cumsum(3) / 20
    with torch.no_grad():
        network.train()(image)
        seg = network.classifier.conv_seg
        seg.weight.normal_()
        seg.weight *= 3 / network.eval()(image).std()
    return network


@_once_per_network
def random_weights(network_name: str) -> str:
    """Save the weights of `random_network` with a config and class names; return the file."""
    path = Path(_folder.name, f"random_{network_name}.safetensors")
    classes = load_classes(CLASSES, 12)
    save_weights(path, random_network().state_dict(), {"eval_dataset": {"final_size": 32}}, classes)
    return str(path)


@_once_per_network
def finished_run(network_name: str) -> tuple[Any, str]:
    """Train four steps with the recipe `mild`; return the trainer and the save folder."""
    from main import main

    place = Path(_folder.name, network_name)
    data, folder = place / "data", str(place / "finished")
    make(str(data), training=8, validation=5, size=48)
    dataset = {"path": str(data), "base_size": 32, "final_size": 32, "batch_size": 4}
    config = {
        "run_name": "finished",
        "recipe_name": "mild",
        "mild": {"max_duration": "4ba", "ema": {"half_life": "2ba", "update_interval": "1ba"}},
        "model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None},
        "train_dataset": {**dataset, "num_workers": 0},
        "eval_dataset": {**dataset, "num_workers": 0},
        "optimizer": {"lr": 0.02},
        "eval_interval": "2ba",
        "save_interval": "4ba",
        "train_metrics_interval": 2,
        "pictures": 2,
        "class_names": str(ROOT / "yamls" / "demo_classes.txt"),
        "precision": "fp32",
        "class_table_csv": True,
        "save_folder": f"{place}/{{run_name}}",
        "loggers": {"tensorboard": {"log_dir": folder, "flush_interval": 1}},
    }
    return main(config), folder
