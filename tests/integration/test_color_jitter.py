"""The colour distortion has the same distribution as torchvision's ColorJitter."""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import ColorJitter

from dataset.color_jitter import distort_colors
from tests.support.transforms import as_batch, random_image, uniform_numbers


def plain_distortion(image: Image.Image, rng: random.Random) -> Image.Image:
    brightness, contrast = ColorJitter(brightness=32 / 255), ColorJitter(contrast=0.5)
    saturation, hue = ColorJitter(saturation=0.5), ColorJitter(hue=18 / 255)
    contrast_first = rng.random() < 0.5
    steps = [brightness, contrast, saturation, hue]
    steps = steps if contrast_first else [brightness, saturation, hue, contrast]
    for step in steps:
        image = step(image) if rng.random() < 0.5 else image
    return image


def color_statistics(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float64)
    red, green, blue = image.mean(axis=(0, 1))
    clipped = (image >= 254).mean()
    saturation = (image.max(-1) - image.min(-1)).mean()
    return np.array([red, green, blue, image.std(), saturation, clipped * 100])


def test_distorted_colours_have_distribution_of_torchvision() -> None:
    count, image = 1200, random_image(24, 32, seed=3)
    image[..., 0] = np.minimum(
        image[..., 0] // 2 + 128, 255
    )  # make the image reddish instead of grey
    torch.manual_seed(0)
    rng = random.Random(0)
    picture = Image.fromarray(image)
    expected = np.array(
        [color_statistics(np.asarray(plain_distortion(picture, rng))) for _ in range(count)]
    )
    uniform = torch.rand(9, count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    batch = as_batch(image).expand(count, -1, -1, -1).float()
    out = distort_colors(batch, torch.ones(count, 1, 24, 32), uniform)
    actual = np.array([color_statistics(each) for each in out.permute(0, 2, 3, 1).numpy()])
    error = np.sqrt(expected.std(0) ** 2 / count + actual.std(0) ** 2 / count)
    # Pillow truncates, which lowers the mean by half a grey level per step.
    assert (np.abs(expected.mean(0) - actual.mean(0)) < 3.5 * error + 1).all()
    assert np.allclose(expected.std(0), actual.std(0), rtol=0.1)


def test_each_colour_distortion_has_probability_one_half() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (4000, 3, 4, 4), dtype=torch.uint8, generator=generator)
    uniform = uniform_numbers(batch, 17, 0, 9)
    parts = zip(batch.float().split(1), torch.ones(4000, 1, 4, 4).split(1), uniform.split(1, 1))
    out = torch.cat([distort_colors(*part) for part in parts])
    same = (out == batch).flatten(1).all(1).float().mean()
    assert abs(same - 1 / 16) < 4 * (1 / 16 / 4000) ** 0.5
