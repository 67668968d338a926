"""Weights of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from checkpointing.weights import load_weights
from networks.base import current_names
from networks.registry import named_network
from tests.support.networks import hf_folder  # noqa: F401


def test_hf_folder_weights_are_loaded_except_the_classifier(hf_folder: str) -> None:
    network = named_network(f"hf:{hf_folder}", 3, {}, "any")
    # save_pretrained writes the parameter names of transformers 4.
    saved = current_names(network, load_weights(Path(hf_folder, "model.safetensors")).state)
    own = network.network.state_dict()
    mismatched = [name for name in own if own[name].shape != saved[name].shape]
    assert mismatched == ["decode_head.classifier.weight", "decode_head.classifier.bias"]
    assert all(torch.equal(own[name], saved[name]) for name in own if name not in mismatched)
