"""What happens to a photo and its mask, from encoded bytes to the model's input.

On the CPU, one sample at a time and `uint8` throughout: `RandomCrop` (training) and `Resize`
(evaluation). The mask is decoded first and the crop chosen on it; then the photo is decoded, no
larger than needed, and only the crop is resized. On the device, one batch at a time:
`DeviceTransform` distorts colours, normalises and turns labels into class indices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from colors import distort_colors, uniform_per_sample
from decoding import REDUCTIONS, decode_image, decode_mask, decode_photo

__all__ = [
    "DeviceTransform",
    "RandomCrop",
    "Resize",
    "build_ade20k_transformations",
    "decode_image",
    "decode_mask",
    "decode_photo",
]

IMAGENET_CHANNEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_CHANNEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

PADDING = 255  # In a mask: outside the photo. Ignored, and black after normalisation.
IGNORED = 254  # In a mask: a pixel of the photo that is ignored, though label 0 may not be.
PADDING_COLOR = tuple(int(channel) for channel in IMAGENET_CHANNEL_MEAN)


def resize_crop(
    image: np.ndarray,
    size: tuple[int, int],
    top: int,
    left: int,
    height: int,
    width: int,
    full: tuple[float, float] | None = None,
) -> np.ndarray:
    """A crop of a resized photo, resizing little more than the crop.

    Bilinear, antialiased where it shrinks, as Pillow's. The edges of the part that is resized are
    moved outwards, by up to 16 source pixels, to where an edge of a source pixel all but coincides
    with one of a resized pixel: the crop is shifted by 1/32 pixel at most.

    Args:
        image (np.ndarray): (H, W, 3) uint8.
        size (tuple[int, int]): Height and width that the whole photo is resized to.
        top, left, height, width (int): The crop, in resized pixels.
        full (tuple[float, float], optional): Height and width of the photo in pixels of `image`,
            if the last row or column is not a whole one. Default: None, (H, W).

    Returns:
        np.ndarray: (height, width, 3) uint8.
    """
    full = full or image.shape[:2]
    rows, out_rows = _window(image.shape[0], size[0] / full[0], top, height)
    columns, out_columns = _window(image.shape[1], size[1] / full[1], left, width)
    part = image[rows, columns]
    shape = (out_rows.stop - out_rows.start, out_columns.stop - out_columns.start)
    if part.shape[:2] != shape:
        if size[0] < full[0] or size[1] < full[1]:  # OpenCV does not antialias, torch does
            part = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]
            part = torch.nn.functional.interpolate(part, shape, mode="bilinear", antialias=True)
            part = part[0].permute(1, 2, 0).numpy()
        else:
            part = cv2.resize(part, shape[::-1], interpolation=cv2.INTER_LINEAR)
    top, left = top - out_rows.start, left - out_columns.start
    return part[top : top + height, left : left + width]


def _window(limit: int, scale: float, start: int, length: int) -> tuple[slice, slice]:
    """One axis of `resize_crop`: the source pixels to resize, and the pixels they become."""
    search = 16
    margin = 1 + math.ceil(1 / scale)  # what interpolation reaches beyond the crop
    low = max(0, math.floor(start / scale) - margin)
    high = min(limit, math.ceil((start + length) / scale) + margin)
    first = _most_aligned(max(0, low - search), low, scale)
    last = _most_aligned(high, min(limit, high + search), scale)
    return slice(first, last), slice(round(first * scale), round(last * scale))


def _most_aligned(low: int, high: int, scale: float) -> int:
    """The source position in low..high that is nearest to a whole position when resized."""
    resized = np.arange(low, high + 1) * scale
    return low + int(np.abs(resized - np.rint(resized)).argmin())


def crop_labels(
    mask: np.ndarray,
    size: tuple[int, int],
    top: int,
    left: int,
    height: int,
    width: int,
    step: int = 1,
) -> np.ndarray:
    """Every `step`-th pixel of a crop of a mask that Pillow's nearest neighbour resizes."""
    rows = np.arange(top, top + height, step) + 0.5
    columns = np.arange(left, left + width, step) + 0.5
    rows = (rows * (mask.shape[0] / size[0])).astype(np.intp)
    columns = (columns * (mask.shape[1] / size[1])).astype(np.intp)
    return mask[rows][:, columns]


class PairTransform:
    """What is done to a photo and its mask together, both as arrays."""

    def apply(
        self,
        load_image: Callable[[int], np.ndarray],
        mask: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Transform a sample.

        Args:
            load_image (Callable[[int], np.ndarray]): Gives the photo, (H, W, 3) uint8, at 1/1, 1/2,
                1/4 or 1/8 of its size (see `decode_photo`).
            mask (np.ndarray): (H, W) uint8.
            rng (np.random.Generator): The only source of randomness.

        Returns:
            tuple[np.ndarray, np.ndarray]: (final_size, final_size, 3) and (final_size, final_size).
        """
        raise NotImplementedError

    def __call__(self, sample: tuple) -> tuple[np.ndarray, np.ndarray]:
        """Transform a pair of Pillow images or arrays, at random as the system's entropy has it."""
        image, mask = sample
        image = image.convert("RGB") if isinstance(image, Image.Image) else image
        load_image = lambda reduction: np.asarray(image)[::reduction, ::reduction]  # noqa: E731
        return self.apply(load_image, np.asarray(mask), np.random.default_rng())


class Resize(PairTransform):
    """Resize photo (bilinear, antialiased) and mask (nearest) to `final_size` squared."""

    def __init__(self, final_size: int = 512):
        self.final_size = final_size

    def apply(self, load_image, mask, rng):
        size = (self.final_size, self.final_size)
        return resize_crop(load_image(1), size, 0, 0, *size), crop_labels(mask, size, 0, 0, *size)


class RandomCrop(PairTransform):
    """Resize to a square of random size, crop, flip half of the time, pad evenly to `final_size`.

    The crop is drawn again, up to `retries` times, while one class has more than `max_class_share`
    of its labelled pixels (label 0 and ignored ones do not count), as seen on a grid of about
    128x128 of them.
    """

    def __init__(
        self,
        base_size: int = 512,
        min_resize_scale: float = 0.5,
        max_resize_scale: float = 2.0,
        final_size: int = 512,
        max_class_share: float = 0.75,
        retries: int = 10,
    ):
        self.base_size, self.final_size = base_size, final_size
        self.min_resize_scale, self.max_resize_scale = min_resize_scale, max_resize_scale
        self.max_class_share, self.retries = max_class_share, retries

    def apply(self, load_image, mask, rng):
        low, high = self.min_resize_scale, self.max_resize_scale
        side = max(1, int(self.base_size * (low + rng.random() * (high - low))))
        size, box = (side, side), self._choose_crop(mask, side, rng)
        reduction = max(k for k in REDUCTIONS if k == 1 or min(mask.shape) >= k * side)
        image = load_image(reduction)
        full = (mask.shape[0] / reduction, mask.shape[1] / reduction)
        if image.shape[0] > full[0] + 1:  # not a JPEG: no reduction
            full = mask.shape
        crop, labels = resize_crop(image, size, *box, full), crop_labels(mask, size, *box)
        if rng.random() < 0.5:
            crop, labels = cv2.flip(crop, 1), cv2.flip(labels, 1)
        return self._pad(crop, PADDING_COLOR), self._pad(labels, PADDING)

    def _choose_crop(
        self, mask: np.ndarray, side: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop of the mask resized to `side` squared."""
        length = min(side, self.final_size)
        step = max(1, length // 128)
        for _ in range(1 + self.retries):
            top, left = (int(rng.random() * (side - length + 1)) for _ in range(2))
            box = (top, left, length, length)
            if side == length or self._is_varied(crop_labels(mask, (side, side), *box, step)):
                break
        return box

    def _is_varied(self, labels: np.ndarray) -> bool:
        count = np.bincount(labels.ravel(), minlength=256)[1:IGNORED]
        return 0 < count.max() <= self.max_class_share * count.sum()

    def _pad(self, crop: np.ndarray, value: int | tuple[int, ...]) -> np.ndarray:
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
) -> tuple[PairTransform, None, None]:
    """The transforms of a split, for `data.ADE20k`.

    Args:
        split (str): 'train', or 'val', which only resizes.
        base_size (int): Side of the square that a photo is resized to, before it is scaled.
            Default: 512.
        min_resize_scale (float): Least random scale. Default: 0.5.
        max_resize_scale (float): Greatest random scale. Default: 2.0.
        final_size (int): Side of what comes out. Default: 512.

    Returns:
        tuple: Transforms of the pair, of the photo and of the mask. The latter two are None: what
            the reference does there, `DeviceTransform` does.
    """
    if split == "train":
        return RandomCrop(base_size, min_resize_scale, max_resize_scale, final_size), None, None
    return Resize(final_size), None, None


class DeviceTransform:
    """The device's half: distort colours (training), normalise, make class indices.

    Random numbers are a function of the seed, the epoch and the sample's pixels: no micro-batch
    size, number of ranks or resume changes what becomes of a sample.

    Args:
        num_classes (int): Number of classes. Default: 150.
        ignore_background (bool): Whether label 0 is ignored and label k becomes class k - 1;
            otherwise label k becomes class k. Default: True.
        distort (bool): Whether to distort colours. Default: False.
        seed (int): Seed of the distortion. Default: 17.
        epoch (Callable[[], int], optional): Tells the epoch. Default: None, always 0.
    """

    def __init__(
        self,
        num_classes: int = 150,
        ignore_background: bool = True,
        distort: bool = False,
        seed: int = 17,
        epoch: Callable[[], int] | None = None,
    ):
        self.distort, self.seed, self.epoch = distort, seed, epoch or (lambda: 0)
        self.mean = torch.tensor(IMAGENET_CHANNEL_MEAN).view(1, 3, 1, 1)
        self.scale = 1 / torch.tensor(IMAGENET_CHANNEL_STD).view(1, 3, 1, 1)
        self.class_of_label = torch.arange(256) - int(ignore_background)
        self.class_of_label[num_classes + int(ignore_background) :] = -1

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            batch (tuple[Tensor, Tensor]): Photos (N, 3, H, W) and labels (N, H, W), both uint8.

        Returns:
            tuple[Tensor, Tensor]: Photos (N, 3, H, W) float32, channels-last, normalised, 0 where
                padded; class indices (N, H, W) int64, -1 where ignored.
        """
        raw, labels = batch
        if self.mean.device != raw.device:
            self.mean, self.scale = self.mean.to(raw.device), self.scale.to(raw.device)
            self.class_of_label = self.class_of_label.to(raw.device)
        inside = (labels != PADDING)[:, None]
        image = raw.to(torch.float32, memory_format=torch.contiguous_format)
        if self.distort:
            uniform = uniform_per_sample(raw, self.seed, self.epoch(), 9)
            image = distort_colors(image, inside, uniform)
        image.sub_(self.mean).mul_(self.scale).mul_(inside)
        classes = self.class_of_label[labels.int()]
        return image.contiguous(memory_format=torch.channels_last), classes
