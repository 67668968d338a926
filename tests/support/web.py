"""An exported web page of a small network, and example images for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

import export
from checkpointing.weights import save_weights
from errors import UserError
from extras.preparation.synthetic import make
from extras.sharing import web
from segmentation.classes import load_classes
from tests.support.artifacts import CLASSES, random_network


@pytest.fixture(scope="module")
def runtime() -> Path:
    try:
        return web.fetch_runtime()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return an image larger than the input size, a smaller one, and one with an EXIF rotation."""
    folder = tmp_path_factory.mktemp("images")
    make(str(folder), training=3, validation=1, size=96)
    scenes = sorted((folder / "ADEChallengeData2016/images/training").iterdir())
    large, small, turned = folder / "large one #1.jpg", folder / "small.png", folder / "turned.jpg"
    shutil.copy(scenes[0], large)
    Image.open(scenes[1]).resize((51, 40)).save(small)
    exif = Image.Exif()
    exif[274] = 6
    Image.open(scenes[2]).resize((90, 64)).save(turned, quality=90, exif=exif)
    return [large, small, turned]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    small_network: None,
    runtime: Path,
    images: list[Path],
) -> Path:
    """Export the web page of a small network; return the folder that contains the page."""
    place = tmp_path_factory.mktemp("web")
    weights = place / "weights.safetensors"
    classes = load_classes(CLASSES, 12)
    config = {"eval_dataset": {"final_size": 64}}
    save_weights(weights, random_network().state_dict(), config, classes)
    options = ["--to", "web", "--out", str(place / "demo"), "--size", "48"]
    examples = [option for image in images for option in ("--photo", str(image))]
    assert export.main([str(weights), *options, *examples]) == 0
    return place
