"""What happens to a photo and its mask, from encoded bytes to the model's input.

On the CPU, one sample at a time and `uint8` throughout: `RandomCrop` (training) and `Resize`
(evaluation). The mask is decoded first and the crop chosen on it; then the photo is decoded, no
larger than needed, and only the crop is resized. On the device, one batch at a time:
`DeviceTransform` distorts colours, normalises and turns labels into class indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from dataset.color_jitter import distort_colors, equal_steps, uniform_per_sample
from dataset.decoding import REDUCTIONS
from dataset.encoded import LoadImage, PairTransform
from dataset.labels import IGNORED, PADDING, Labels
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD

PADDING_COLOR = tuple(int(channel) for channel in IMAGENET_CHANNEL_MEAN)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a photo, bilinearly and antialiased where it shrinks, as Pillow does.

    Args:
        image: (H, W, 3) uint8.
        size: Height and width of the result.

    Returns:
        np.ndarray: (*size, 3) uint8.
    """
    if image.shape[:2] == size:
        return image
    if size[0] >= image.shape[0] and size[1] >= image.shape[1]:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # OpenCV does not antialias
    pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    return pixels[0].permute(1, 2, 0).numpy()


def resize_mask(mask: np.ndarray, size: tuple[int, int], step: int = 1) -> np.ndarray:
    """Every `step`-th pixel of a mask (H, W) resized with Pillow's nearest neighbour."""
    rows, columns = (_nearest(*lengths)[::step] for lengths in zip(mask.shape, size))
    return mask[rows][:, columns]


def _nearest(length: int, resized: int) -> np.ndarray:
    """Which of `length` pixels each of `resized` ones is, added up as Pillow does, for ties."""
    steps = np.full(resized, length / resized)
    steps[0] /= 2
    return np.add.accumulate(steps).astype(np.intp)


class Resize(PairTransform):
    """Resize photo (bilinear, antialiased) and mask (nearest) to `final_size` squared."""

    def __init__(self, final_size: int = 512):
        self.final_size = final_size

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Resize; see `PairTransform.apply`."""
        size = (self.final_size, self.final_size)
        return resize_image(load_image(1), size), resize_mask(mask, size)


class RandomCrop(PairTransform):
    """Resize to a square of random size, crop, flip half of the time, pad evenly to `final_size`.

    The crop's sides are moved to the next whole pixel of the photo (of the photo as it is decoded,
    if it shrinks to half or less), and only what is inside is resized. The crop is drawn again, up
    to `retries` times, while one class has more than `max_class_share` of its labelled pixels, as
    seen on a grid of about 128x128 of them. A share of 1 never draws again.

    `is_class` is a (256,) bool: which labels are classes. By default label 0 is not.
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
        self.max_class_share, self.retries = max_class_share, retries
        self.classes = slice(1, IGNORED) if is_class is None else np.flatnonzero(is_class)

    def apply(
        self, load_image: LoadImage, mask: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Crop; see `PairTransform.apply`."""
        low, high = self.min_resize_scale, self.max_resize_scale
        side = max(1, int(self.base_size * (low + rng.random() * (high - low))))
        grid = max(k for k in REDUCTIONS if k == 1 or min(mask.shape) >= k * side)
        size = (min(side, self.final_size), min(side, self.final_size))
        rows, columns = self._choose_crop(mask, side, size, grid, rng)
        image, labels = load_image(grid), resize_mask(mask[rows, columns], size)
        if image.shape[0] == mask.shape[0]:  # Only JPEGs are decoded smaller.
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
        """Rows and columns of the photo for a crop of `size` when it is resized to `side` squared.

        They begin and end at multiples of `grid`, or at the photo's end.
        """
        step = max(1, size[0] // 128)
        for _ in range(1 + self.retries):
            crop = []
            for length in mask.shape:
                first = int(rng.random() * (side - size[0] + 1))
                start = round(first * length / side / grid) * grid
                stop = round((first + size[0]) * length / side / grid) * grid
                start = min(start, (length - 1) // grid * grid)
                is_end = first + size[0] == side or stop > length
                crop.append(slice(start, length if is_end else max(stop, start + 1)))
            labels = mask[crop[0], crop[1]]
            if side == size[0] or self.max_class_share >= 1:
                break
            if self._is_varied(resize_mask(labels, size, step)):
                break
        return crop

    def _is_varied(self, labels: np.ndarray) -> bool:
        count = np.bincount(labels.ravel(), minlength=256)[self.classes]
        return bool(0 < count.max() <= self.max_class_share * count.sum())

    def _pad(self, crop: np.ndarray, value: tuple[int, ...]) -> np.ndarray:
        missing = self.final_size - len(crop)
        if missing == 0:
            return crop
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
        split: 'train', or 'val', which only resizes.
        base_size: Side of the square that a photo is resized to, before it is scaled.
        min_resize_scale: Least random scale.
        max_resize_scale: Greatest random scale.
        final_size: Side of what comes out.
        max_class_share: See `RandomCrop`.
        is_class: See `RandomCrop`.

    Returns:
        tuple: Transforms of the pair, of the photo and of the mask. The latter two are None: what
            the reference does there, `DeviceTransform` does.
    """
    if split == "train":
        sizes = base_size, min_resize_scale, max_resize_scale, final_size
        return RandomCrop(*sizes, max_class_share, is_class=is_class), None, None
    return Resize(final_size), None, None


class DeviceTransform:
    """The device's half: distort colours (training), normalise, make class indices.

    Random numbers are a function of the seed, the epoch and the sample's pixels: no micro-batch
    size, number of ranks or resume changes what becomes of a sample.

    Args:
        labels: What the masks hold.
        distort: Whether to distort colours.
        seed: Seed of the distortion.
        epoch: Tells the epoch; None: it is always 0.
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
        # Numbers: torch 2.7 does not compile what reads them off a NamedTuple's properties.
        self.first, self.num_classes = self.labels.first, self.labels.num_classes
        self.steps = equal_steps(9)
        self._on_gpu = self._transform

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set mean and standard deviation of the normalisation, of values from 0 to 255."""
        self.mean = torch.tensor(mean).view(1, 3, 1, 1)
        self.scale = 1 / torch.tensor(std).view(1, 3, 1, 1)

    def compile(self) -> None:
        """On a GPU, run as a few kernels rather than 260, for each of which it reads its input."""
        self._on_gpu = torch.compile(self._transform)

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            batch: Photos (N, 3, H, W) and labels (N, H, W), both uint8.

        Returns:
            tuple[Tensor, Tensor]: Photos (N, 3, H, W) float32, channels-last, normalised, 0 where
                padded; class indices (N, H, W) int64, -1 where ignored.
        """
        raw, labels = batch
        self.mean, self.scale = self.mean.to(raw.device), self.scale.to(raw.device)
        self.steps = self.steps.to(raw.device)
        # Tensors: by a number that changes, each epoch would be compiled anew.
        seed, epoch = (
            torch.full((), number, dtype=torch.int64, device=raw.device)
            for number in (self.seed, self.epoch())
        )
        transform = self._on_gpu if raw.is_cuda else self._transform
        return transform(raw, labels, seed, epoch)

    def _transform(
        self, raw: Tensor, labels: Tensor, seed: Tensor, epoch: Tensor
    ) -> tuple[Tensor, Tensor]:
        inside = (labels != PADDING)[:, None].float()
        uniform = uniform_per_sample(raw, seed, epoch, self.steps)
        image = torch.empty(raw.shape, device=raw.device, memory_format=torch.channels_last)
        # One by one on a CPU: what fits its cache is faster, and most steps need not be taken.
        parts = len(raw) if raw.device.type == "cpu" else 1
        arguments = (raw, inside, uniform.transpose(0, 1), image)
        for part in zip(*(each.tensor_split(parts) for each in arguments)):
            part[-1].copy_(self._transform_image(*part[:-1]))
        index = labels - self.first  # Of an ignored label 0 it is 255.
        return image, index.long().masked_fill_(index >= self.num_classes, -1)

    def _transform_image(self, raw: Tensor, inside: Tensor, uniform: Tensor) -> Tensor:
        image = raw.to(torch.float32, memory_format=torch.contiguous_format)
        if self.distort:
            image = distort_colors(image, inside, uniform.transpose(0, 1))
        return image.sub_(self.mean).mul_(self.scale).mul_(inside)
