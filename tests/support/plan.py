"""A config file, a network and its memory footprint for `main.py --plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from model import deeplabv3
from training.microbatch import Footprint, count
from training.schema import Config

SIZE = 64


@pytest.fixture(scope="module")
def network(small_network: None) -> torch.nn.Module:
    result = deeplabv3(12, "resnet50").to(memory_format=torch.channels_last)
    result.upsample = False
    return result


@pytest.fixture(scope="module")
def footprint(network: torch.nn.Module) -> Footprint:
    return count(network, SIZE, torch.bfloat16)


def settings(**changes: Any) -> Config:
    config = Config(**changes)
    config.train_dataset.batch_size = 128
    return config


@pytest.fixture
def config(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    tiny |= {"save_folder": "out", "loggers": {"progress_bar": {}}, "max_duration": "3ep"}
    file.write_text(json.dumps(tiny))  # JSON is also YAML
    return file
