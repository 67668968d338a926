"""Small images and masks in given layouts, and the samples that a suggested description finds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import yaml
from PIL import Image

from data import build_ade20k_dataspec
from dataset.description import Description, parse_description
from dataset.matching import find_samples
from extras.preparation import check_command

check = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)
SIZE = 32


def random_image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def blocks(seed: int, values: tuple[int, ...] = (0, 1, 2)) -> np.ndarray:
    """Return a mask of squares of 8 x 8 pixels in which every value occurs."""
    rng = np.random.default_rng(1000 + seed)
    coarse = rng.choice(np.array(values), (4, 4))
    coarse.flat[: len(values)] = values
    return coarse.repeat(8, 0).repeat(8, 1).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, palette: list[int] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(palette)
    image.save(path)


def lay_out(root: Path, templates: list[tuple[str, str, list]]) -> None:
    """Write an image and a mask for each name of each pair of path templates; "" writes no file."""
    seed = 0
    for image, mask, names in templates:
        for name in names:
            seed += 1
            if image:
                save(root / image.format(name), random_image(seed))
            if mask:
                save(root / mask.format(name), blocks(seed))


def described(root: Path, text: str) -> tuple[Description, dict[str, list]]:
    """Parse a suggested description; return it and the samples that it finds in each split."""
    description = parse_description(yaml.safe_load(text))
    samples = {}
    for split in ("train", "val"):
        samples[split], problems = find_samples(description, split, str(root))
        # With few images, a validation fraction may leave a split empty.
        assert all("holds no" in problem.reason for problem in problems if problem.fatal)
    return description, samples


N = [f"{n:03}" for n in range(8)]


def smooth(mask: np.ndarray) -> np.ndarray:
    return cv2.GaussianBlur(mask, (3, 3), 1)


def drawn_large(seed: int, of: str, blur: Callable[[np.ndarray], np.ndarray] | None) -> np.ndarray:
    mask = cv2.resize(blocks(seed), None, fx=8, fy=8, interpolation=cv2.INTER_NEAREST)
    mask = np.array([0, 100, 200], np.uint8)[mask] if of == "grey" else COLORS[mask]
    return blur(mask) if blur else mask


COLORS = np.array([[10, 0, 200], [128, 64, 128], [70, 20, 30]], np.uint8)


COLORED = [[0, 0, 0], [128, 64, 128], [0, 0, 142]]
