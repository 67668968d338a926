"""Tests of dataset/color_jitter.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image

from dataset.color_jitter import distort_colors
from dataset.labels import Labels
from tests.support.transforms import as_batch, batch_of, random_image, uniform_numbers
from transforms import (
    DeviceTransform,
)

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def uniform_for(*steps: tuple[int, float], contrast_first: bool = True) -> torch.Tensor:
    """Return random numbers that enable the given steps, with amounts from -1 to 1."""
    uniform = torch.full((9, 1, 1, 1, 1), 0.9)
    for step, amount in steps:
        uniform[step], uniform[4 + step] = 0.1, (amount + 1) / 2
    uniform[8] = 0.1 if contrast_first else 0.9
    return uniform


def distort(image: np.ndarray, uniform: torch.Tensor) -> np.ndarray:
    batch = as_batch(image).float()
    out = distort_colors(batch, torch.ones(1, 1, *image.shape[:2]), uniform)
    return out[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("amount", [-1.0, -0.4, 0.0, 0.3, 0.99])
def test_each_colour_jitter_step_matches_torchvision_on_pillow_images(amount: float) -> None:
    image = random_image(48, 64)
    picture = Image.fromarray(image)
    cases = {
        BRIGHTNESS: TF.adjust_brightness(picture, 1 + amount * 32 / 255),
        CONTRAST: TF.adjust_contrast(picture, 1 + amount * 0.5),
        SATURATION: TF.adjust_saturation(picture, 1 + amount * 0.5),
        HUE: TF.adjust_hue(picture, amount * 18 / 255),
    }
    for step, expected in cases.items():
        error = np.abs(distort(image, uniform_for((step, amount))) - np.asarray(expected))
        # Pillow truncates fractions, and rounds hue and saturation to 256 steps.
        assert error.mean() < (2.5 if step == HUE else 0.7), (step, error.mean())
        assert error.max() < (16 if step == HUE else 1.6), (step, error.max())


@pytest.mark.parametrize("contrast_first", [True, False])
def test_colour_jitter_steps_run_in_order_with_clipping_in_between(contrast_first: bool) -> None:
    image = random_image(48, 64)
    steps = [(BRIGHTNESS, 1.0), (CONTRAST, 1.0), (SATURATION, -1.0), (HUE, 0.7)]
    actual = distort(image, uniform_for(*steps, contrast_first=contrast_first))
    expected = TF.adjust_brightness(Image.fromarray(image), 1 + 32 / 255)
    if contrast_first:
        expected = TF.adjust_contrast(expected, 1.5)
    expected = TF.adjust_hue(TF.adjust_saturation(expected, 0.5), 0.7 * 18 / 255)
    if not contrast_first:
        expected = TF.adjust_contrast(expected, 1.5)
    assert np.abs(actual - np.asarray(expected)).mean() < 3
    other = distort(image, uniform_for(*steps, contrast_first=not contrast_first))
    assert np.abs(other - np.asarray(expected)).mean() > 6


def test_contrast_jitter_ignores_the_padding() -> None:
    image, inside = np.full((40, 40, 3), 255, np.uint8), np.zeros((40, 40), bool)
    inside[5:30, 5:35] = True
    image[inside] = random_image(25, 30).reshape(-1, 3)
    out = distort_colors(
        as_batch(image).float(),
        torch.from_numpy(inside)[None, None].float(),
        uniform_for((CONTRAST, -0.8)),
    )
    expected = TF.adjust_contrast(Image.fromarray(random_image(25, 30)), 0.6)
    actual = out[0].permute(1, 2, 0).numpy()[5:30, 5:35]
    assert np.abs(actual - np.asarray(expected)).max() < 1.6


def test_jitter_random_numbers_depend_only_on_seed_epoch_and_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (500, 3, 8, 8), dtype=torch.uint8, generator=generator)
    uniform = uniform_numbers(batch, 17, 3, 9)
    assert uniform.shape == (9, 500, 1, 1, 1)
    assert torch.equal(uniform[:, 30:50], uniform_numbers(batch[30:50], 17, 3, 9))
    last = batch.contiguous(memory_format=torch.channels_last)
    assert torch.equal(uniform, uniform_numbers(last, 17, 3, 9))
    for seed, epoch in ((18, 3), (17, 4), (3, 17)):
        assert (uniform == uniform_numbers(batch, seed, epoch, 9)).float().mean() < 0.01
    values = uniform.flatten(1)
    assert values.min() >= 0 and values.max() < 1
    # The values are uniform and independent, within 4 standard deviations.
    assert (values.mean(1) - 0.5).abs().max() < 4 * (1 / 12 / 500) ** 0.5
    assert (torch.corrcoef(values) - torch.eye(9)).abs().max() < 4 / 500**0.5
    near = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    near = uniform_numbers(near, 17, 0, 2)
    assert torch.corrcoef(torch.stack([near[0].flatten(), torch.arange(256.0)]))[0, 1].abs() < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_colour_jitter_on_a_gpu_matches_the_cpu() -> None:
    raw, labels = batch_of(8)
    transform = DeviceTransform(Labels(20), distort=True)
    image, target = transform((raw, labels))
    gpu_image, gpu_target = transform((raw.cuda(), labels.cuda()))
    assert torch.equal(uniform_numbers(raw, 1, 2, 9), uniform_numbers(raw.cuda(), 1, 2, 9).cpu())
    assert torch.allclose(image, gpu_image.cpu(), atol=1e-3)
    assert torch.equal(target, gpu_target.cpu())


@pytest.mark.parametrize("size", [16, 17, 49, 50, 51, 321])
def test_jitter_random_numbers_do_not_depend_on_the_batch(size: int) -> None:
    batch, _ = batch_of(3, size)
    together = uniform_numbers(batch, 17, 2, 4)
    for layout in (batch, batch.contiguous(), batch.contiguous(memory_format=torch.channels_last)):
        alone = [uniform_numbers(layout[i : i + 1], 17, 2, 4) for i in range(3)]
        assert torch.equal(torch.cat(alone, dim=1), together)
