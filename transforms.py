"""Transforms of images and masks, from encoded files to model input.

On the CPU, samples are transformed one at a time and stay `uint8`. In training, `RandomCrop`
chooses a crop from the decoded mask, decodes the image at the smallest sufficient size, and resizes
only the crop. In evaluation, `Resize` resizes the complete image. On the device, `DeviceTransform`
distorts the colours of a batch, normalises it, and turns labels into class indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.color_jitter import distort_colors, equal_steps, uniform_per_sample
from dataset.decoding import REDUCTIONS
from dataset.encoded import LoadImage, PairTransform
from dataset.labels import IGNORED, PADDING, Labels
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD

# Pad with the mean colour, which normalises to about 0. DeviceTransform later sets the padding to
# exactly 0.
PADDING_COLOR = tuple(int(channel) for channel in IMAGENET_CHANNEL_MEAN)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image as Pillow does, bilinearly and with antialiasing when it shrinks.

    Args:
        image: (H, W, 3) uint8.
        size: Height and width of the result, in pixels.

    Returns:
        np.ndarray: (*size, 3) uint8.
    """
    if image.shape[:2] == size:
        return image
    # OpenCV resizes without antialiasing, so use it only to enlarge images.
    if size[0] >= image.shape[0] and size[1] >= image.shape[1]:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def resize_mask(mask: np.ndarray, size: tuple[int, int], step: int = 1) -> np.ndarray:
    """Resize a mask (H, W) as Pillow does, and keep only every `step`-th row and column."""
    # MosaicML's code resizes masks with Pillow. OpenCV's nearest-neighbour resizing would pick
    # different pixels.
    rows, columns = (_nearest(*lengths)[::step] for lengths in zip(mask.shape, size))
    return mask[rows][:, columns]


def _nearest(length: int, resized: int) -> np.ndarray:
    """Return the source index of each pixel of the resized mask, rounding ties as Pillow does."""
    steps = np.full(resized, length / resized)
    # Add the steps one by one, as Pillow does, because a product would round differently. The first
    # sampling point is the centre of the first resized pixel.
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)


class Resize(PairTransform):
    """A transform that resizes images (bilinear) and masks (nearest) to a fixed square."""

    def __init__(self, final_size: int = 512):
        self.final_size = final_size

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resize a sample; see `PairTransform.apply`."""
        # Ignore the aspect ratio, as MosaicML's code does. By default, evaluate.py keeps it.
        size = (self.final_size, self.final_size)
        return resize_image(load_image(1), size), resize_mask(mask, size)


class RandomCrop(PairTransform):
    """A random resize, crop and flip, followed by padding to a square of side `final_size`.

    The image is resized to a square of random size, and cropped if it is larger than `final_size`.
    The crop is drawn again, up to `retries` times, while one class covers more than
    `max_class_share` of its labelled pixels. The shares are estimated on a grid of about 128 x 128
    pixels. With `max_class_share=1`, no crop is ever redrawn.

    Crops are aligned with the image's pixels, so that only the pixels inside the crop are resized.
    If the image shrinks to half or less, crops are aligned with the pixels of the smaller decoded
    image.

    `is_class` is a (256,) bool array that marks the labels of classes; by default, all labels
    except 0.
    """

    def __init__(
        self,
        base_size: int = 512,
        min_resize_scale: float = 0.5,
        max_resize_scale: float = 2.0,
        final_size: int = 512,
        max_class_share: float = 0.75,
        retries: int = 10,
        is_class: np.ndarray | None = None,
    ):
        self.base_size, self.final_size = base_size, final_size
        self.min_resize_scale, self.max_resize_scale = min_resize_scale, max_resize_scale
        # The defaults, a maximum share of 0.75 and 10 retries, are the same as in MosaicML's code.
        self.max_class_share, self.retries = max_class_share, retries
        self.classes = slice(1, IGNORED) if is_class is None else np.flatnonzero(is_class)

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crop a sample; see `PairTransform.apply`."""
        # Draw the random numbers in a fixed order (scale, crops, flip), so that a resumed run
        # reproduces them.
        low, high = self.min_resize_scale, self.max_resize_scale
        side = max(1, int(self.base_size * (low + rng.random() * (high - low))))
        # The grid is the largest reduction factor (1, 2, 4 or 8) at which the decoded image is
        # still at least as large as the resized image. libjpeg decodes reduced images faster.
        grid = max(k for k in REDUCTIONS if k == 1 or min(mask.shape) >= k * side)
        # If the resized image is smaller than the crop, use all of it and pad it later.
        size = (min(side, self.final_size), min(side, self.final_size))
        rows, columns = self._choose_crop(mask, side, size, grid, rng)
        image, labels = load_image(grid), resize_mask(mask[rows, columns], size)
        if image.shape[0] == mask.shape[0]:  # Only JPEG files can be decoded at a reduced size.
            grid = 1
        rows, columns = (slice(s.start // grid, -(-s.stop // grid)) for s in (rows, columns))
        crop = resize_image(image[rows, columns], size)
        if rng.random() < 0.5:
            crop, labels = cv2.flip(crop, 1), cv2.flip(labels, 1)
        return self._pad(crop, PADDING_COLOR), self._pad(labels, (PADDING,))

    def _choose_crop(
        self,
        mask: np.ndarray,
        side: int,
        size: tuple[int, int],
        grid: int,
        rng: np.random.Generator,
    ) -> list[slice]:
        """Return the rows and columns of the image that form a crop of the given size.

        The given size refers to the image after it is resized to `side` x `side`. The returned rows
        and columns begin and end at multiples of `grid`, or at the image's edge.
        """
        # About 128 x 128 sampled pixels are enough to estimate the class shares.
        step = max(1, size[0] // 128)
        for _ in range(1 + self.retries):
            crop = []
            for length in mask.shape:
                first = int(rng.random() * (side - size[0] + 1))
                start = round(first * length / side / grid) * grid
                stop = round((first + size[0]) * length / side / grid) * grid
                # In a small image, rounding may leave a crop at the edge empty, so keep at least
                # one pixel.
                start = min(start, (length - 1) // grid * grid)
                is_end = first + size[0] == side or stop > length
                crop.append(slice(start, length if is_end else max(stop, start + 1)))
            labels = mask[crop[0], crop[1]]
            # If the crop is the whole image, stop, because another draw would give the same crop.
            if side == size[0] or self.max_class_share >= 1:
                break
            if self._is_varied(resize_mask(labels, size, step)):
                break
        return crop

    def _is_varied(self, labels: np.ndarray) -> bool:
        count = np.bincount(labels.ravel(), minlength=256)[self.classes]
        # Also reject a crop without labelled pixels.
        return bool(0 < count.max() <= self.max_class_share * count.sum())

    def _pad(self, crop: np.ndarray, value: tuple[int, ...]) -> np.ndarray:
        missing = self.final_size - len(crop)
        if missing == 0:
            return crop
        # Pad evenly on all sides, so that the image stays in the centre.
        before, after = missing // 2, missing - missing // 2
        sides = (before, after, before, after)
        return cv2.copyMakeBorder(crop, *sides, cv2.BORDER_CONSTANT, value=value)


def build_ade20k_transformations(
    split: str,
    base_size: int = 512,
    min_resize_scale: float = 0.5,
    max_resize_scale: float = 2.0,
    final_size: int = 512,
    max_class_share: float = 0.75,
    is_class: np.ndarray | None = None,
) -> tuple[PairTransform, None, None]:
    """Return the transforms of a split, for `data.ADE20k`.

    Args:
        split: 'train' for random crops, or 'val' for a plain resize.
        base_size: Side in pixels of the square that an image is resized to before the random scale.
        min_resize_scale: Smallest random scale.
        max_resize_scale: Largest random scale.
        final_size: Side of the resulting square, in pixels.
        max_class_share: See `RandomCrop`.
        is_class: See `RandomCrop`.

    Returns:
        tuple: The transform of the pair, the transform of the image and the transform of the mask.
        The transforms of the image and of the mask are None, because `DeviceTransform` replaces
        those of MosaicML's code.
    """
    if split == "train":
        sizes = base_size, min_resize_scale, max_resize_scale, final_size
        return RandomCrop(*sizes, max_class_share, is_class=is_class), None, None
    return Resize(final_size), None, None


class DeviceTransform:
    """The part of the transforms that runs on the device.

    The transform distorts colours (training only), normalises images, and turns labels into class
    indices. The random numbers depend only on the seed, the epoch and the sample's pixels.
    Therefore, the result does not depend on the micro-batch size, on the number of ranks, or on
    whether the run was resumed.

    Args:
        labels: Meaning of the labels in the masks.
        distort: Whether to distort colours.
        seed: Seed of the distortion.
        epoch: Function that returns the current epoch number, or None for epoch 0.
    """

    def __init__(
        self,
        labels: Labels | None = None,
        distort: bool = False,
        seed: int = 17,
        epoch: Callable[[], int] | None = None,
    ):
        self.labels = labels or Labels()
        self.distort, self.seed, self.epoch = distort, seed, epoch or (lambda: 0)
        self.normalise_by(IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD)
        # Store plain integers, because torch 2.7 cannot compile access to NamedTuple properties.
        self.first, self.num_classes = self.labels.first, self.labels.num_classes
        # Each sample needs 9 random numbers. For brightness, contrast, saturation and hue, one
        # number decides whether to change the property, and another decides by how much. The last
        # number decides when to change contrast.
        self.steps = equal_steps(9)
        self._on_gpu = self._transform

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the normalisation's mean and standard deviation, for pixel values from 0 to 255."""
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        # Store the inverse of the standard deviation, because multiplication is cheaper than
        # division.
        self.scale = 1 / torch.tensor(std).view(1, 3, 1, 1)

    def compile(self) -> None:
        """Compile the transform for GPUs, where this fuses 260 kernels into a few."""
        self._on_gpu = torch.compile(self._transform)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            batch: Images (N, 3, H, W) and labels (N, H, W), both uint8.

        Returns:
            tuple[Tensor, Tensor]: Normalised images (N, 3, H, W) as channels-last float32, with 0
                in the padding; and class indices (N, H, W) as int64, with -1 for ignored pixels.
        """
        raw, labels = batch
        self.mean, self.scale = self.mean.to(raw.device), self.scale.to(raw.device)
        self.steps = self.steps.to(raw.device)
        # Pass the seed and epoch as tensors, because torch.compile would recompile for each new
        # Python number.
        seed, epoch = (
            torch.full((), number, dtype=torch.int64, device=raw.device)
            for number in (self.seed, self.epoch())
        )
        transform = self._on_gpu if raw.is_cuda else self._transform
        return transform(raw, labels, seed, epoch)

    def _transform(
        self, raw: Tensor, labels: Tensor, seed: Tensor, epoch: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Exclude the padding from the mean grey level that the contrast change uses.
        inside = (labels != PADDING)[:, None].float()
        uniform = uniform_per_sample(raw, seed, epoch, self.steps)
        image = torch.empty(raw.shape, device=raw.device, memory_format=torch.channels_last)
        # On a CPU, transform images one by one. A single image fits in the cache, and colour
        # changes that it does not need are skipped.
        parts = len(raw) if raw.device.type == "cpu" else 1
        arguments = (raw, inside, uniform.transpose(0, 1), image)
        for part in zip(*(each.tensor_split(parts) for each in arguments)):
            part[-1].copy_(self._transform_image(*part[:-1]))
        # If label 0 is ignored, this uint8 subtraction turns it into 255, above every class index.
        index = labels - self.first
        # The labels 254 (ignored) and 255 (padding) are above every class index (at most 252).
        return image, index.long().masked_fill_(index >= self.num_classes, -1)

    def _transform_image(self, raw: Tensor, inside: Tensor, uniform: Tensor) -> Tensor:
        image = raw.to(torch.float32, memory_format=torch.contiguous_format)
        if self.distort:
            image = distort_colors(image, inside, uniform.transpose(0, 1))
        return image.sub_(self.mean).mul_(self.scale).mul_(inside)


def device_transforms(data: Iterable[Any]) -> list[DeviceTransform]:
    """Return the DeviceTransform of each DataSpec that has one."""
    found = (spec.microbatch_transforms for spec in data if spec)
    return [transform for transform in found if isinstance(transform, DeviceTransform)]
