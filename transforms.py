"""What happens to a photo and its mask, from encoded bytes to the model's input.

On the CPU, one sample at a time and `uint8` throughout: :class:`RandomCrop` (training) and :class:`Resize` (evaluation)
take the encoded files, so that the crop can be chosen on the mask before anything of the photo is resized. On the
device, one batch at a time: :class:`DeviceTransform` distorts colours, normalises and turns labels into class indices.
"""

from __future__ import annotations

import io
import math
from typing import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_CHANNEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_CHANNEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

PADDING = 255  # mask value of pixels outside the photo: black after normalisation, ignored
IGNORED = 254  # mask value of pixels of the photo that are ignored

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def _open(data: bytes) -> Image.Image:
    """Decode with Pillow, which refuses what is cut short; ValueError with a one-line reason."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Exception as error:  # Pillow's plugins raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image"
        raise ValueError(f"cannot be decoded: {reason}") from None
    return image


def decode_image(data: bytes) -> np.ndarray:
    """Decode a photo of any common format and mode.

    Args:
        data (bytes): The encoded file.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        ValueError: With a one-line reason, if it is no image or is cut short.
    """
    whole = data.endswith(_JPEG_END) if data.startswith(_JPEG_START) else data.endswith(_PNG_END)
    image = None
    if whole:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    if image is None:
        from PIL import ImageOps

        image = np.array(ImageOps.exif_transpose(_open(data)).convert("RGB"))
    return image


def decode_mask(data: bytes) -> np.ndarray:
    """Decode a mask of class labels.

    Args:
        data (bytes): The encoded file: lossless, grey, palette (its indices are the labels) or three equal channels.

    Returns:
        np.ndarray: (H, W) uint8 labels as stored.

    Raises:
        ValueError: With a one-line reason, if it is no image, is cut short or holds no labels.
    """
    if data.startswith(_PNG_START) and data.endswith(_PNG_END) and data[24:26] == b"\x08\x00":
        mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if mask is not None and mask.ndim == 2:
            return mask
    image = _open(data)
    return _labels(image)


def _labels(image: Image.Image) -> np.ndarray:
    """The labels of a decoded mask, (H, W) uint8."""
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG mask: lossy compression changes labels, save masks as PNG")
    mask = np.asarray(image)
    if mask.ndim == 3:
        if image.mode not in ("LA", "La") and (mask[..., :3] != mask[..., :1]).any():
            raise ValueError(
                f"a colour picture (mode {image.mode}) where class labels are expected"
            )
        mask = mask[..., 0]
    if mask.dtype == bool:
        return mask.astype(np.uint8)
    if mask.dtype != np.uint8:
        if mask.min() < 0 or mask.max() > 255:
            raise ValueError(f"label {mask.max()} does not fit 8 bits")
        mask = mask.astype(np.uint8)
    return np.ascontiguousarray(mask)


def resize_crop(
    image: np.ndarray, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> np.ndarray:
    """A crop of a resized photo, resizing little more than the crop.

    Bilinear, antialiased where it shrinks, as Pillow's. Each side of the part that is resized is moved outwards, by up to
    16 source pixels, to where a source pixel's edge all but coincides with a resized one's, so that no phase is lost.

    Args:
        image (np.ndarray): (H, W, 3) uint8.
        size (tuple[int, int]): Height and width to resize the whole photo to.
        top, left, height, width (int): The crop, in pixels of the resized photo.

    Returns:
        np.ndarray: (height, width, 3) uint8.
    """
    rows, out_rows = _aligned_window(image.shape[0], size[0], top, height)
    columns, out_columns = _aligned_window(image.shape[1], size[1], left, width)
    part = image[rows[0] : rows[1], columns[0] : columns[1]]
    out_size = (out_rows[1] - out_rows[0], out_columns[1] - out_columns[0])
    if part.shape[:2] != out_size:
        if size[0] < image.shape[0] or size[1] < image.shape[1]:
            part = torch.from_numpy(np.ascontiguousarray(part)).permute(2, 0, 1)[None]
            part = torch.nn.functional.interpolate(part, out_size, mode="bilinear", antialias=True)
            part = part[0].permute(1, 2, 0).numpy()
        else:
            part = cv2.resize(part, out_size[::-1], interpolation=cv2.INTER_LINEAR)
    top, left = top - out_rows[0], left - out_columns[0]
    return part[top : top + height, left : left + width]


def _aligned_window(
    size: int, resized: int, start: int, length: int, search: int = 16
) -> tuple[tuple[int, int], tuple[int, int]]:
    """One axis of :func:`resize_crop`: the source pixels to resize, and the resized pixels they become."""
    scale = resized / size
    margin = 1 + math.ceil(1 / scale)  # what interpolation reaches beyond the crop
    lower = max(0, math.floor(start / scale) - margin)
    upper = min(size, math.ceil((start + length) / scale) + margin)
    first = min(range(lower, max(lower - search, 0) - 1, -1), key=lambda x: _misfit(x * scale))
    last = min(range(upper, min(upper + search, size) + 1), key=lambda x: _misfit(x * scale))
    return (first, last), (round(first * scale), round(last * scale))


def _misfit(position: float) -> float:
    """Distance to the next integer."""
    return abs(position - round(position))


def crop_labels(
    mask: np.ndarray, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> np.ndarray:
    """A crop of a mask resized to `size` with Pillow's nearest neighbour, without resizing the whole mask."""
    rows = ((np.arange(top, top + height) + 0.5) * (mask.shape[0] / size[0])).astype(np.intp)
    columns = ((np.arange(left, left + width) + 0.5) * (mask.shape[1] / size[1])).astype(np.intp)
    return mask[rows][:, columns]


class _Pair:
    """What is done to a photo and its mask together; see :class:`RandomCrop` and :class:`Resize`."""

    def apply(
        self,
        image: np.ndarray | Callable[[], np.ndarray],
        mask: np.ndarray,
        rng: np.random.Generator | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def __call__(self, sample: tuple) -> tuple:
        """Transform a (photo, mask) pair of Pillow images or arrays; arrays (H, W, 3) and (H, W) uint8 come back."""
        image, mask = sample
        if isinstance(image, Image.Image):
            image = image.convert("RGB")
        return self.apply(np.asarray(image), np.asarray(mask), None)


class RandomCrop(_Pair):
    """Resize to a random square size, crop, flip half of the time, and pad evenly to `final_size`.

    The crop is drawn again, up to `retries` times, while one class fills more than `max_class_share` of its labelled
    pixels (labels 0, other, and ignored ones do not count).
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

    def apply(self, image, mask, rng=None):
        rng = rng or np.random.default_rng()
        scale = self.min_resize_scale + rng.random() * (
            self.max_resize_scale - self.min_resize_scale
        )
        size = max(1, int(self.base_size * scale))
        side = min(size, self.final_size)
        for _ in range(1 + self.retries):
            top, left = (int(rng.random() * (size - side + 1)) for _ in "yx")
            labels = crop_labels(mask, (size, size), top, left, side, side)
            if size == side or self._is_varied(labels):
                break
        image = image() if callable(image) else image
        crop = resize_crop(image, (size, size), top, left, side, side)
        if rng.random() < 0.5:
            crop, labels = cv2.flip(crop, 1), cv2.flip(labels, 1)
        return self._pad(crop, labels)

    def _is_varied(self, labels: np.ndarray) -> bool:
        count = cv2.calcHist([labels], [0], None, [256], [0, 256])[1:IGNORED]
        return count.max() <= self.max_class_share * count.sum() and count.max() > 0

    def _pad(self, image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        missing = self.final_size - image.shape[0]
        if missing == 0:
            return image, labels
        before, after = missing // 2, missing - missing // 2
        sides = (before, after, before, after, cv2.BORDER_CONSTANT)
        mean = tuple(int(channel) for channel in IMAGENET_CHANNEL_MEAN)
        return (
            cv2.copyMakeBorder(image, *sides, value=mean),
            cv2.copyMakeBorder(labels, *sides, value=PADDING),
        )


class Resize(_Pair):
    """Resize photo (bilinear, antialiased) and mask (nearest) to `final_size` squared."""

    def __init__(self, final_size: int = 512):
        self.final_size = final_size

    def apply(self, image, mask, rng=None):
        image = image() if callable(image) else image
        size = (self.final_size, self.final_size)
        return resize_crop(image, size, 0, 0, *size), crop_labels(mask, size, 0, 0, *size)


def build_ade20k_transformations(
    split: str,
    base_size: int = 512,
    min_resize_scale: float = 0.5,
    max_resize_scale: float = 2.0,
    final_size: int = 512,
) -> tuple[Callable, Callable | None, Callable | None]:
    """The transforms of a split, for :class:`data.ADE20k`.

    Args:
        split (str): 'train', or 'val' for evaluation's resize alone.
        base_size (int): Side that the photo and mask are resized to, before scaling. Default: 512.
        min_resize_scale (float): Least random scale. Default: 0.5.
        max_resize_scale (float): Greatest random scale. Default: 2.0.
        final_size (int): Side of what comes out. Default: 512.

    Returns:
        tuple: Transforms of the pair, the photo and the mask; the latter two are None, because colours are distorted
            on the device (:class:`DeviceTransform`).
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, not 'train' or 'val'")
    if split == "train":
        return RandomCrop(base_size, min_resize_scale, max_resize_scale, final_size), None, None
    return Resize(final_size), None, None


def _hash(values: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64: the same bits on every device."""
    for multiplier in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):
        values = (values ^ ((values >> 32) & 0xFFFFFFFF)) * multiplier
    return values ^ ((values >> 32) & 0xFFFFFFFF)


def uniform_per_sample(image: Tensor, seed: int, epoch: int, count: int) -> Tensor:
    """Random numbers that depend on seed, epoch and the sample's pixels alone.

    Args:
        image (Tensor): (N, 3, H, W) uint8.

    Returns:
        Tensor: (count, N, 1, 1, 1) float32, uniform in [0, 1).
    """
    checksum = image.sum(dim=(1, 2, 3), dtype=torch.int64)
    counter = torch.arange(1, count + 1, device=image.device)
    state = _hash(_hash(checksum * 0x9E3779B1 + epoch) + seed)
    bits = _hash(state + counter[:, None] * -0x61C8864680B583EB)
    return (((bits >> 40) & 0xFFFFFF).float() / 2**24)[..., None, None, None]


class DeviceTransform:
    """The device's half of the pipeline: distort colours (training), normalise, make class indices.

    Random numbers are a function of the seed, the epoch and the sample's pixels, so micro-batching, the number of ranks
    and a resume change nothing.

    Args:
        num_classes (int): N; labels 1..N are classes.
        ignore_background (bool): Whether label 0, other, is ignored and label k becomes index k-1; otherwise label k
            becomes index k.
        distort (bool): Whether to distort colours.
        seed (int): Seed of the distortion.
        epoch (Callable[[], int]): Tells the epoch.
    """

    def __init__(
        self,
        num_classes: int = 150,
        ignore_background: bool = True,
        distort: bool = False,
        seed: int = 17,
        epoch: Callable[[], int] = lambda: 0,
    ):
        self.distort, self.seed, self.epoch = distort, seed, epoch
        self.mean = torch.tensor(IMAGENET_CHANNEL_MEAN).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_CHANNEL_STD).view(1, 3, 1, 1)
        self.index = torch.arange(256) - int(ignore_background)
        last = num_classes if ignore_background else num_classes - 1
        self.index[last + 1 :] = -1

    def __call__(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Transform a batch.

        Args:
            batch (tuple[Tensor, Tensor]): Photos (N, 3, H, W) uint8 and labels (N, H, W) uint8.

        Returns:
            tuple[Tensor, Tensor]: Photos (N, 3, H, W) float32, normalised, channels-last, 0 where padded; class indices
                (N, H, W) int64, -1 where ignored.
        """
        raw, labels = batch
        device = raw.device
        if self.index.device != device:
            self.mean, self.std = self.mean.to(device), self.std.to(device)
            self.index = self.index.to(device)
        photo = (labels != PADDING)[:, None]
        image = raw.to(torch.float32, memory_format=torch.channels_last)
        if self.distort:
            image = distort_colors(
                image, photo, uniform_per_sample(raw, self.seed, self.epoch(), 10)
            )
        image = ((image - self.mean) / self.std) * photo
        return image, self.index[labels.int()]


def distort_colors(image: Tensor, photo: Tensor, uniform: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, each for half of the samples, as torchvision's on Pillow images.

    Brightness is scaled by 1 ± 32/255; contrast (0.5 to 1.5) moves towards the mean grey of the photo and comes first or
    last at random; saturation (0.5 to 1.5) moves towards each pixel's grey; hue turns by up to ±18/255 of the circle.

    Args:
        image (Tensor): (N, 3, H, W) float in 0..255.
        photo (Tensor): (N, 1, H, W) bool, False where padded.
        uniform (Tensor): (10, N, 1, 1, 1) in [0, 1).

    Returns:
        Tensor: (N, 3, H, W), clipped to 0..255 after each step.
    """
    on = uniform[:4] < 0.5
    amount = uniform[4:8] * 2 - 1  # -1..1
    contrast_first = uniform[8] < 0.5
    brightness = torch.where(on[0], 1 + amount[0] * (32 / 255), 1.0)
    contrast = torch.where(on[1], 1 + amount[1] * 0.5, 1.0)
    saturation = torch.where(on[2], 1 + amount[2] * 0.5, 1.0)
    hue = torch.where(on[3], amount[3] * (18 / 255), 0.0)
    image = (image * brightness).clamp_(0, 255)
    image = _blend(image, _mean_gray(image, photo), torch.where(contrast_first, contrast, 1.0))
    image = _blend(image, _gray(image), saturation)
    image = _turn_hue(image, hue)
    return _blend(image, _mean_gray(image, photo), torch.where(contrast_first, 1.0, contrast))


def _gray(image: Tensor) -> Tensor:
    """ITU-R 601-2 luma, (N, 1, H, W)."""
    red, green, blue = image.split(1, dim=1)
    return red * 0.299 + green * 0.587 + blue * 0.114


def _mean_gray(image: Tensor, photo: Tensor) -> Tensor:
    """Mean luma of each photo without its padding, (N, 1, 1, 1)."""
    area = photo.sum(dim=(1, 2, 3), keepdim=True).clamp_(min=1)
    return (_gray(image) * photo).sum(dim=(1, 2, 3), keepdim=True) / area


def _blend(image: Tensor, other: Tensor, weight: Tensor) -> Tensor:
    return (other + (image - other) * weight).clamp_(0, 255)


def _turn_hue(image: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (fractions of the circle) to the hue of HSV, keeping saturation and value.

    With V = max and C = max - min, channel n of an HSV colour of hue h is V - C clip(min(k, 4 - k), 0, 1) where
    k = (n + 6 h) mod 6 and n is 5, 3, 1 for red, green, blue.
    """
    red, green, blue = image.split(1, dim=1)
    high, low = image.amax(dim=1, keepdim=True), image.amin(dim=1, keepdim=True)
    chroma = high - low
    sixth = torch.where(
        high == red,
        green - blue,
        torch.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    ) / chroma.clamp(min=1e-6)
    sixth = sixth + 6 * turn
    channels = []
    for n in (5, 3, 1):
        k = torch.remainder(n + sixth, 6)
        channels.append(high - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.cat(channels, dim=1).contiguous(memory_format=torch.channels_last)
