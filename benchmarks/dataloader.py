"""Compare the throughput of this project's loader with that of a Pillow loader, on one core.

    python -m benchmarks.dataloader            # generated images with ADE20K's sizes
    python -m benchmarks.dataloader --path ./ade20k --json result.json

The Pillow loader uses torchvision and Pillow in the usual way: it decodes and resizes the entire
image. To choose a crop, the Pillow loader makes up to 10 attempts and counts the classes with
`np.unique` each time. Finally, the Pillow loader flips and pads the image, changes its colours with
ColorJitter and converts the target to int64.

This project augments colours on the device. On a GPU, this takes negligible time (see
`benchmarks.studies.device_transform`). The third table row includes the colour augmentation and the
normalisation, computed on the same core as the loader.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms import functional

from benchmarks.harness import head, in_turn, machine, make_parser, row, write_json
from data import ADE20k, build_ade20k_dataspec
from dataset.paths import FOLDERS
from dataset.sampler import EpochSampler

SIZE, BATCH = 512, 8
# torchvision's functions accept Pillow images, but their type annotations do not say so. Use `Any`
# to disable the type checks.
TF: Any = functional
RandomCrop: Any = transforms.RandomCrop


def make_data(
    root: Path, count: int, split: str = "train", size: tuple[int, int] | None = None
) -> None:
    """Generate images and masks with image sizes and file sizes similar to ADE20K's.

    The mean image size is 516x417 pixels. The mean area is 0.236 megapixels, and 90% of the images
    are smaller than 0.39 megapixels. The images take about 1.5 bits per pixel, and each mask takes
    a few kilobytes. The images are noise with the spectrum of natural images. Each class in a mask
    gets a smooth random field, and each pixel is assigned to the class with the highest value. One
    or two classes cover most of each mask.

    Args:
        root: Folder for the generated data set.
        count: Number of images.
        split: Split that the images belong to, "train" or "val".
        size: Height and width of all images, or None for ADE20K's distribution of sizes.
    """
    rng = np.random.default_rng(0)
    for kind in ("images", "annotations"):
        for folder in FOLDERS.values():
            (root / kind / folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        # Draw the image area from a log-normal distribution that has the same mean and 90th
        # percentile as ADE20K.
        area = min(0.21e6 * np.exp(0.483 * rng.standard_normal()), 4.41e6)
        aspect = np.exp(0.21 + 0.25 * rng.standard_normal())
        width, height = (max(96, round((area * a) ** 0.5)) for a in (aspect, 1 / aspect))
        height, width = size or (height, width)
        name = f"ADE_{split}_{number + 1:08d}"
        image = Image.fromarray(_random_image(rng, height, width))
        image.save(root / "images" / FOLDERS[split] / f"{name}.jpg", quality=80)
        mask = Image.fromarray(_mask(rng, height, width))
        mask.save(root / "annotations" / FOLDERS[split] / f"{name}.png")


def _noise(rng: np.random.Generator, height: int, width: int, slope: float) -> np.ndarray:
    """Return Gaussian noise with amplitude spectrum 1/f^slope, mean 0 and variance 1."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**slope
    noise = np.fft.irfft2(spectrum, (height, width))
    return (noise - noise.mean()) / max(noise.std(), 1e-9)


def _smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return smooth noise, computed at a quarter of the resolution and upsampled."""
    noise = _noise(rng, height // 4, width // 4, 1.8)
    return cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)


def _random_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    gray = _noise(rng, height, width, 1.4)
    color = np.stack([_smooth(rng, height, width) for _ in range(3)], axis=-1)
    return np.clip(120 + 50 * gray[..., None] + 20 * color, 0, 255).astype(np.uint8)


def _mask(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    classes = rng.choice(np.arange(1, 151), rng.integers(3, 14), replace=False)
    labels = np.append(0, classes)
    handicap = np.append(1.5, rng.exponential(0.9, len(classes)))
    fields = [_smooth(rng, height, width) - bias for bias in handicap]
    return labels[np.argmax(fields, axis=0)].astype(np.uint8)


class PillowLoader:
    """An iterable of training batches, loaded with torchvision and Pillow."""

    def __init__(self, samples: list):
        self.samples = samples
        self.jitter = [
            transforms.ColorJitter(brightness=32 / 255),
            transforms.ColorJitter(contrast=0.5),
            transforms.ColorJitter(saturation=0.5),
            transforms.ColorJitter(hue=18 / 255),
        ]

    def __iter__(self):
        for start in range(0, len(self.samples) - BATCH + 1, BATCH):
            pairs = [self.load(sample) for sample in self.samples[start : start + BATCH]]
            images, targets = zip(*pairs)
            yield torch.stack(images), torch.stack(targets)

    def load(self, sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Load and augment one sample with Pillow and torchvision."""
        image = Image.open(sample.image_path).convert("RGB")
        target = Image.open(sample.mask_path)
        size = [int(SIZE * random.uniform(0.5, 2.0))] * 2
        image = TF.resize(image, size, TF.InterpolationMode.BILINEAR)
        target = TF.resize(target, size, TF.InterpolationMode.NEAREST)
        if size[0] > SIZE:
            image, target = self._crop(image, target)
        if random.random() < 0.5:
            image, target = TF.hflip(image), TF.hflip(target)
        image = self._distort(image)
        missing = max(SIZE - size[0], 0)
        padding = [missing // 2, missing // 2, missing - missing // 2, missing - missing // 2]
        image = TF.pad(image, padding, fill=(123, 116, 103))
        target = TF.pad(target, padding, fill=0)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels, torch.from_numpy(np.array(target, np.int64)) - 1

    def _crop(self, image: Image.Image, target: Image.Image) -> tuple[Image.Image, Image.Image]:
        box = RandomCrop.get_params(image, (SIZE, SIZE))
        for _ in range(10):
            labels, counts = np.unique(np.array(TF.crop(target, *box)), return_counts=True)
            counts = counts[labels != 0]
            if len(counts) > 1 and counts.max() < 0.75 * counts.sum():
                break
            box = RandomCrop.get_params(image, (SIZE, SIZE))
        return TF.crop(image, *box), TF.crop(target, *box)

    def _distort(self, image: Image.Image) -> Image.Image:
        brightness, contrast, saturation, hue = self.jitter
        contrast_first = random.random() < 0.5
        steps = [brightness, contrast, saturation, hue]
        if not contrast_first:
            steps = [brightness, saturation, hue, contrast]
        for step in steps:
            if random.random() < 0.5:
                image = step(image)
        return image


def images_per_second(batches: Iterable) -> float:
    """Return the throughput of one pass over the batches, in images per second."""
    start = time.perf_counter()
    seen = sum(len(images) for images, _ in batches)
    return seen / (time.perf_counter() - start)


def measure(path: str, repeats: int, limit: int, num_classes: int) -> dict[str, Any]:
    """Measure the throughput of each loader in turn, and return the results."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    spec = build_ade20k_dataspec(
        path,
        False,
        batch_size=BATCH,
        final_size=SIZE,
        num_classes=num_classes,
        num_workers=0,
        pin_memory=False,
    )
    loader, transform = cast(DataLoader, spec.dataloader), spec.microbatch_transforms
    dataset, sampler = cast(ADE20k, loader.dataset), cast(EpochSampler, loader.sampler)
    count = min(limit, len(dataset)) // BATCH * BATCH
    samples = [dataset.samples[index] for index in range(count)]
    dataset.samples = samples
    sampler.__init__(dataset, BATCH)
    sides: dict[str, Callable[[], float]] = {
        "Pillow": lambda: images_per_second(PillowLoader(samples)),
        "this project": lambda: images_per_second(loader),
        "this project, and its device's part": lambda: images_per_second(map(transform, loader)),
    }
    # Discard the warm-up round, which reads the files into the operating system's cache.
    rates = in_turn(sides, repeats, warm_up=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "data": path,
        "images": len(samples),
        "size": SIZE,
        "repeats": repeats,
        "images_per_second": rates,
        "median": medians,
        "ratio": {name: median / medians["Pillow"] for name, median in medians.items()},
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    """Return the throughputs and ratios as a Markdown table."""
    lines = [head("", "images/s on one core", "of the passes", "ratio")]
    for name, rates in result["images_per_second"].items():
        median, ratio = result["median"][name], result["ratio"][name]
        spread = f"{min(rates):.0f}-{max(rates):.0f}"
        lines.append(row(name, f"{median:.0f}", spread, f"{ratio:.2f}"))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the benchmark and return the result that `--json` writes."""
    parser = make_parser(__doc__)
    parser.add_argument("--path", help="data set in ADE20K's layout; default: one made for this")
    parser.add_argument("--num-classes", type=int, default=150, help="of --path (default: 150)")
    parser.add_argument("--images", type=int, default=400, help="images a pass (default: 400)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="passes to take the median of (default: 5)"
    )
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if not args.path:
            make_data(Path(folder), args.images)
        result = measure(args.path or folder, args.repeats, args.images, args.num_classes)
    if not args.path:
        result["data"] = "made, with ADE20K's size distribution"
    print(f"{result['images']} images of {result['data']}, {SIZE} px, {result['machine']['cpu']}\n")
    print(table(result))
    write_json(args, result)
    return result


if __name__ == "__main__":
    main()
