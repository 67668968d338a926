"""Tests of networks/hf.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpointing.partial_load import load_fitting
from checkpointing.weights import load_weights
from errors import ModelError
from networks import hf
from networks.libraries import Request
from networks.registry import named_network
from tests.support.networks import hf_folder  # noqa: F401


def test_hf_weights_of_transformers_4_are_loaded(hf_folder: str) -> None:
    """save_pretrained still writes the parameter names of transformers 4."""
    weights = load_weights(Path(hf_folder, "model.safetensors"))
    network = named_network(f"hf:{hf_folder}", 5, {})
    assert weights.state.keys() != network.network.state_dict().keys()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert load_fitting(network, weights, "file", least=1.0, num_classes=5) is None
    assert all(p.abs().sum() > 0 for p in network.parameters() if p.ndim > 1)


@pytest.mark.parametrize("kind", ["mask2former", "maskformer", "eomt", "oneformer", "detr", "bert"])
@pytest.mark.parametrize("from_file", [False, True])
def test_hf_network_for_another_task_is_rejected(
    tmp_path: Path, kind: str, from_file: bool
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    arguments = {"config": {"model_type": kind}} if from_file else {}
    with pytest.raises(ModelError, match=rf"type {kind} do not predict a class .*segformer"):
        hf.build(Request(f"hf:{tmp_path}", 3, arguments, None, from_file))
