"""Weights and an image for model cards, a local Hugging Face hub, and a folder exported for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import export
from checkpointing.weights import save_weights
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, random_network
from tests.support.hub_server import TOKEN, Hub, hub


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small_network: None, synthetic: str) -> Path:
    """Return a file with a small network's weights and the config of a run on `synthetic`."""
    place = tmp_path_factory.mktemp("card")
    dataset = {"path": synthetic, "final_size": 32, "batch_size": 4}
    config = {
        "model": {"num_classes": 12, "backbone_arch": "resnet50"},
        "train_dataset": dataset,
        "eval_dataset": dataset,
        "optimizer": {"lr": 0.02},
        "recipe_name": "mild",
    }
    path = place / "first.safetensors"
    state = random_network().state_dict()
    save_weights(path, state, config, load_classes(CLASSES, 12), "ema")
    return path


@pytest.fixture(scope="module")
def image_path(tmp_path_factory: pytest.TempPathFactory, synthetic: str) -> Path:
    path = tmp_path_factory.mktemp("image") / "street.jpg"
    image = next(Path(synthetic).rglob("ADE_val_*.jpg"))
    Image.open(image).resize((60, 45)).save(path)
    return path


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with hub() as server:
        set_constants(monkeypatch, server.url, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def set_constants(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Set the huggingface_hub constants that are read from `HF_ENDPOINT` and others at import."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture(scope="module")
def exported(weights: Path, image_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `export.py --to hub` writes without `--repo`."""
    folder = tmp_path_factory.mktemp("exported") / "hub"
    options = ["--to", "hub", "--out", str(folder), "--photo", str(image_path), "--size", "48"]
    assert export.main([str(weights), *options, "--licence", "CC BY 4.0"]) == 0
    return folder


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])
