"""Measure the loader's throughput on one core for masks stored in different formats.

    python -m benchmarks.studies.masks             # generated images with ADE20K's sizes
    python -m benchmarks.studies.masks --path ./ade20k --json result.json

The masks are stored as class indices, palette images, 16-bit images or colours. The images and the
labels are the same for all formats. Only the mask files and the data description differ.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks import dataloader
from benchmarks.dataloader import BATCH, SIZE, images_per_second
from benchmarks.harness import in_turn
from data import ADE20k, build_ade20k_dataspec
from dataset.description import parse_description
from dataset.matching import list_samples
from dataset.paths import Sample
from dataset.sampler import EpochSampler

COLORS = np.random.default_rng(0).choice(2**24, 256, replace=False)
COLORS = np.stack([COLORS & 255, COLORS >> 8 & 255, COLORS >> 16], 1).astype(np.uint8)


def write_palette(labels: np.ndarray, path: Path) -> None:
    """Write labels as a palette image."""
    image = Image.fromarray(labels)
    image.putpalette(COLORS.ravel().tolist())
    image.save(path)


def write_colors(labels: np.ndarray, path: Path) -> None:
    """Write labels as an RGB image with one colour per label."""
    Image.fromarray(COLORS[labels]).save(path)


def write_16_bits(labels: np.ndarray, path: Path) -> None:
    """Write labels as a 16-bit image, with gaps between the values."""
    cv2.imwrite(str(path), labels.astype(np.uint16) * 257)


def lay_out(samples: list[Sample], root: Path, count: int) -> dict[str, dict[str, Any]]:
    """Write the samples' masks in each format, and return a data description for each format."""
    found: dict[str, dict[str, Any]] = {}
    ways: dict[str, tuple[Callable[[np.ndarray, Path], None], Callable[[int], Any]]] = {
        "index": (lambda labels, path: Image.fromarray(labels).save(path), lambda k: k),
        "palette": (write_palette, lambda k: k),
        "16 bits": (write_16_bits, lambda k: 257 * k),
        "colours": (write_colors, lambda k: COLORS[k].tolist()),
    }
    for name, (write, label) in ways.items():
        folder = root / name
        folder.mkdir(parents=True)
        for sample in samples:
            labels = np.array(Image.open(sample.mask_path))
            write(labels, folder / f"{Path(sample.image_path).stem}.png")
        images = str(Path(samples[0].image_path).parent)
        found[name] = {
            "train": {"images": images, "masks": name},
            "val": {"images": images, "masks": name},
            "classes": {f"class {k}": {"labels": [label(k)]} for k in range(1, count + 1)},
            "ignore": [label(0)],
        }
    return found


def measure(path: str, repeats: int, limit: int, num_classes: int) -> dict[str, Any]:
    """Measure the throughput for each mask format in turn, and return the results."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    samples = list_samples(path, "train")[:limit]
    samples = samples[: len(samples) // BATCH * BATCH]
    loaders: dict[str, DataLoader] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, raw in lay_out(samples, Path(folder), num_classes).items():
            spec = build_ade20k_dataspec(
                folder,
                False,
                batch_size=BATCH,
                final_size=SIZE,
                num_workers=0,
                pin_memory=False,
                description=parse_description(raw),
            )
            loaders[name] = cast(DataLoader, spec.dataloader)
            dataset = cast(ADE20k, loaders[name].dataset)
            stems = {Path(sample.image_path).stem for sample in samples}
            dataset.samples = [s for s in dataset.samples if Path(s.image_path).stem in stems]
            cast(EpochSampler, loaders[name].sampler).__init__(dataset, BATCH)
        passes = {name: partial(images_per_second, loader) for name, loader in loaders.items()}
        # The warm-up round reads the files into the operating system's cache.
        rates = in_turn(passes, repeats, warm_up=True)
    return dataloader.results(path, len(samples), rates)


if __name__ == "__main__":
    dataloader.main(measure=measure, images=160)
