"""Random images, masks and batches, and the differences of two images."""

from __future__ import annotations

import io

import cv2
import numpy as np
import torch
from PIL import Image

from dataset.color_jitter import equal_steps, uniform_per_sample
from dataset.labels import IGNORED, PADDING
from transforms import (
    PADDING_COLOR,
)


def random_image(height: int, width: int, seed: int = 0, detail: int = 12) -> np.ndarray:
    """Return an image of smooth random spots that are `detail` pixels wide."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // detail), -(-width // detail), 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def blobs(height: int, width: int, classes: int = 6, seed: int = 0) -> np.ndarray:
    """Return a mask of connected regions with labels 0 to `classes`."""
    rng = np.random.default_rng(seed)
    fields = rng.standard_normal((-(-height // 12), -(-width // 12), classes + 1))
    fields = cv2.resize(fields, (width, height), interpolation=cv2.INTER_CUBIC)
    return fields.reshape(height, width, -1).argmax(-1).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert np.asarray(a).shape == np.asarray(b).shape
    return np.abs(np.asarray(a).astype(int) - np.asarray(b))


IMAGE = Image.fromarray(random_image(45, 61))


def as_batch(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def batch_of(count: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    images = np.stack([random_image(size, size, seed) for seed in range(count)])
    labels = np.stack([blobs(size, size, 20, seed) for seed in range(count)])
    labels[:, :4], images[:, :4] = PADDING, PADDING_COLOR
    labels[:, 5] = IGNORED
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def uniform_numbers(image: torch.Tensor, seed: int, epoch: int, count: int) -> torch.Tensor:
    """Return `count` random numbers per sample, drawn as in the device transform."""
    state = (torch.tensor(number, device=image.device) for number in (seed, epoch))
    return uniform_per_sample(image, *state, equal_steps(count).to(image.device))
