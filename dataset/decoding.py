"""Photos and masks from encoded bytes: what people's files hold, or one line on what is wrong."""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
REDUCTIONS = {
    # Not REDUCED_COLOR, of which IMREAD_COLOR is a part: OpenCV 5 refuses it beside COLOR_RGB.
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


def decode_image(data: bytes, reduction: int = 1, upright: bool = True) -> np.ndarray:
    """Decode a photo of any common format and mode.

    Grey becomes three equal channels, and alpha is left aside. Of 16 bits the higher eight are
    kept, or the lower, where no pixel has more.

    Args:
        data: The encoded file.
        reduction: Decode a JPEG at 1/1, 1/2, 1/4 or 1/8 of its size, rounded up, which
            libjpeg does in less time.
        upright: Whether to turn the photo as its EXIF orientation says.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: With a one-line reason, if it is no image, is cut short or has more channels.
    """
    is_jpeg = data.startswith(_JPEG_START)
    _refuse_more_channels(data)
    # OpenCV fills up what is missing of a file; Pillow refuses it.
    if data.endswith(_JPEG_END) if is_jpeg else data.endswith(_PNG_END):
        flags = REDUCTIONS[reduction if is_jpeg else 1]
        flags |= 0 if is_jpeg else cv2.IMREAD_ANYDEPTH
        flags |= 0 if upright else cv2.IMREAD_IGNORE_ORIENTATION
        image = _opencv(data, flags)
        if image is not None:
            return image if image.dtype == np.uint8 else _eight_bits(image)
    image = _decode(data)
    image = _rgb(ImageOps.exif_transpose(image) if upright else image)
    return np.array(image.reduce(reduction) if is_jpeg else image)


def _rgb(image: Image.Image) -> Image.Image:
    """Return a Pillow image of any mode as RGB; ValueError of those it cannot be."""
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers, where 8 or 16 bits are read")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image.convert("RGB")


def _opencv(data: bytes, flags: int) -> np.ndarray | None:
    """Decode with OpenCV; None where it cannot."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # of more pixels than it takes
        return None


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Return (…) uint8 of pixels of 16 bits: the higher eight, unless all have the lower alone."""
    largest = pixels.max()
    if largest > 65535 or pixels.min() < 0:
        raise ValueError("pixels of 32 bits, where 8 or 16 are read")
    return (pixels.astype(np.int64) >> 8 if largest > 255 else pixels).astype(np.uint8)


def _refuse_more_channels(data: bytes) -> None:
    """Raise ValueError for a TIFF whose pixels are more than grey, RGB or CMYK and an alpha."""
    tags = _tiff_tags(data)
    channels, kind, extra = tags.get(277, 1), tags.get(262, 1), tags.get(338, ())
    colors = {2: 3, 5: 4, 6: 3, 8: 3}.get(kind, 1)
    alpha = sum(value in (1, 2) for value in (extra if isinstance(extra, tuple) else (extra,)))
    if channels > colors + alpha:
        raise ValueError(f"{channels} channels, where grey or RGB is read: write those three alone")


def _tiff_tags(data: bytes) -> dict[int, Any]:
    """Return the tags of a TIFF or BigTIFF; none of other files, or of a damaged one."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
        return dict(getattr(image, "tag_v2", {}))
    # Pillow does not open every TIFF that OpenCV does; its reader of tags alone takes more.
    with contextlib.suppress(Exception):
        is_big = data[2:3] == b"+" or data[3:4] == b"+"
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if is_big else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    return {}


def _is_wide(data: bytes) -> bool:
    """Whether a PNG or TIFF has several channels of 16 bits; Pillow drops the low eight."""
    if data.startswith(_PNG_START):
        return data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")
    bits = _tiff_tags(data).get(258, 8)
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8


def decode_photo(data: bytes, shape: tuple[int, int], reduction: int = 1) -> np.ndarray:
    """Decode a photo whose mask has `shape` (H, W).

    The mask decides about EXIF: the photo is turned upright, as a viewer shows it, unless only the
    photo as stored fits the mask.

    Returns:
        np.ndarray: (ceil(H / reduction), ceil(W / reduction), 3) uint8 RGB.

    Raises:
        ValueError: As `decode_image`, and if photo and mask differ in size.
    """
    expected = tuple(-(-side // reduction) for side in shape)
    if not data.startswith(_JPEG_START):
        reduction, expected = 1, tuple(shape)
    image = decode_image(data, reduction)
    if image.shape[:2] == expected:
        return image
    stored = decode_image(data, reduction, upright=False)
    if stored.shape[:2] != expected:
        height, width = decode_image(data).shape[:2]
        raise ValueError(f"the photo is {width}x{height}, its mask {shape[1]}x{shape[0]}")
    return stored


def decode_mask(data: bytes, max_value: int = 255) -> np.ndarray:
    """Decode a mask of class labels.

    Args:
        data: The encoded file: lossless, and grey, with a palette (whose indices are the
            labels) or with three equal channels.
        max_value: Largest label, of 8 or 16 bits.

    Returns:
        np.ndarray: (H, W) uint8, the labels as stored; uint16 where some are above 255.

    Raises:
        ValueError: With a one-line reason, if it is no image, is cut short or holds no labels.
    """
    depth, color = data[24:25], data[25:26]
    grey = depth + color in (b"\x08\x00", b"\x10\x00")  # of 8 and 16 bits
    if data.startswith(_PNG_START) and data.endswith(_PNG_END) and grey:
        mask = _opencv(data, cv2.IMREAD_UNCHANGED)
        if mask is not None and mask.ndim == 2:
            return mask if mask.dtype == np.uint8 else _narrowed(mask, max_value)
    image = _decode(data)
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG mask, and JPEG changes labels: masks have to be PNG")
    mask = np.asarray(image)
    if _is_wide(data):
        wide = _opencv(data, cv2.IMREAD_UNCHANGED)
        if wide is None or wide.ndim != 3:
            raise ValueError("16 bits in several channels cannot be read; write one channel")
        mask = wide
    if mask.ndim == 3:
        if image.mode not in ("LA", "PA") and (mask[..., :3] != mask[..., :1]).any():
            raise ValueError(
                f"a colour picture ({image.mode}), where labels are expected; a description's "
                "labels may be colours, as in labels: [[128, 64, 128]]"
            )
        mask = mask[..., 0]
    if image.format == "PNG" and color == b"\x00" and depth in (b"\x02", b"\x04"):
        mask = mask // (255 // (2 ** depth[0] - 1))  # Pillow spreads grey levels over 0..255
    return _narrowed(mask, max_value)


def _narrowed(mask: np.ndarray, max_value: int) -> np.ndarray:
    """Return labels in as few bits as hold them; ValueError if some are beyond, or no labels."""
    if mask.dtype.kind == "f" and (mask % 1 != 0).any():
        raise ValueError("pixels are floating-point numbers with fractions, which are no labels")
    largest = mask.max()
    if mask.min() < 0 or largest > max_value:
        raise ValueError(f"holds label {largest}, and labels end at {max_value}")
    return np.ascontiguousarray(mask, dtype=np.uint8 if largest <= 255 else np.uint16)


def decode_colors(data: bytes) -> np.ndarray:
    """Decode a mask whose colours are its values.

    Args:
        data: The encoded file: lossless; grey, palette or RGB of 8 bits, any alpha left aside.

    Returns:
        np.ndarray: (H, W) int32, red + 256 * green + 65536 * blue.

    Raises:
        ValueError: With a one-line reason, if it is no such image or is cut short.
    """
    is_whole = data.startswith(_PNG_START) and data.endswith(_PNG_END)
    if is_whole and data[24:26] in (b"\x08\x02", b"\x08\x06"):  # 8 bits, RGB or RGBA
        with contextlib.suppress(RuntimeError):  # for Pillow to say what is wrong with it
            pixels = (_fast_decoder() if data[25] == 2 else _decode_png)(data)
            packed = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA).view(np.int32)[..., 0]
            return np.bitwise_and(packed, 0xFFFFFF, out=packed)
    image = _decode(data)
    if image.format in ("JPEG", "MPO"):
        raise ValueError("a JPEG mask, and JPEG changes colours: masks have to be PNG")
    if _is_wide(data):
        raise ValueError("a mask in colours of 16 bits, where 8 are expected")
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    return pixels[..., 0] | pixels[..., 1] << 8 | pixels[..., 2] << 16


@functools.cache
def _fast_decoder() -> Callable[[bytes], np.ndarray]:
    """Return what decodes RGB: kornia-rs, if it is here, in half of torchvision's time."""
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        return _decode_png

    def decode(data: bytes) -> np.ndarray:
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        if width * height > (Image.MAX_IMAGE_PIXELS or 0):  # it would take that much memory
            raise RuntimeError("too large")
        try:
            return decode_image_png_u8(data, (height, width), "rgb")
        except Exception as error:  # it has none of its own
            raise RuntimeError(str(error)) from error

    return decode


def _decode_png(data: bytes) -> np.ndarray:
    """Decode a PNG of 8 bits to (H, W, 3) RGB."""
    from torchvision.io import ImageReadMode, decode_png  # not what predict.py need wait for

    encoded = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    return decode_png(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _decode(data: bytes) -> Image.Image:
    """Decode with Pillow; ValueError with a one-line reason."""
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Exception as error:  # Pillow's plugins raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot be decoded: {reason}") from None
    return image


Photo = str | os.PathLike | np.ndarray | Image.Image


def read_photo(photo: Photo) -> np.ndarray:
    """Read a photo as an (H, W, 3) uint8 RGB array, turned upright as its EXIF orientation says.

    Raises:
        ValueError: It is no photo; the message is one line.
        OSError: There is no such file.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3:
            raise ValueError(f"expected (H, W, 3) uint8, not {photo.shape} {photo.dtype}")
        return photo
    if isinstance(photo, Image.Image):
        return np.array(_rgb(photo))
    return decode_image(Path(photo).read_bytes())
