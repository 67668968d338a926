"""A transformers model folder, and weights files that contain the name of a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpointing.weights import save_weights


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder in which transformers' save_pretrained has stored a small SegFormer."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    folder = tmp_path_factory.mktemp("hf")
    config = SegformerConfig(
        hidden_sizes=[8, 16, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=16, num_labels=5
    )
    torch.manual_seed(0)
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    processor = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "do_normalize": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def planted(tmp_path: Path, name: str, arguments: dict[str, Any]) -> str:
    """Save a weights file whose config names this network; return its path."""
    path = tmp_path / "planted.safetensors"
    config = {"model": {"name": name, "arguments": arguments, "num_classes": 3}}
    save_weights(path, {"a.weight": torch.zeros(3)}, config)
    return str(path)


HEAD = {"type": "FCNHead", "in_channels": 8, "channels": 8, "num_classes": 3}
