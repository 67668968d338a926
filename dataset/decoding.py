"""Decoders for images and masks in common formats.

If a file cannot be decoded, the error message is a single line that names the problem.
"""

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

from errors import one_line

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
REDUCTIONS = {
    # OpenCV 5 rejects REDUCED_COLOR flags together with COLOR_RGB. It accepts REDUCED_GRAYSCALE
    # flags with COLOR_RGB, and then decodes to colour.
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


def decode_image(data: bytes, reduction: int = 1, upright: bool = True) -> np.ndarray:
    """Decode an image of any common format and colour mode.

    A grey image is expanded to three equal channels. An alpha channel is dropped. 16-bit values are
    reduced to their high byte, or to their low byte if no pixel in the image exceeds 255.

    Args:
        data: Content of the image file.
        reduction: Factor by which to reduce the size of a JPEG: 1, 2, 4 or 8. The reduced size is
            rounded up. A larger factor makes decoding faster.
        upright: Whether to apply the EXIF orientation.

    Returns:
        np.ndarray: (H, W, 3) uint8 RGB.

    Raises:
        ValueError: The file is not an image, is truncated or has too many channels.
    """
    is_jpeg = data.startswith(_JPEG_START)
    _refuse_more_channels(data)
    # If a file is truncated, OpenCV silently makes up the missing pixels, whereas Pillow raises an
    # error. Use OpenCV only if the file ends with its format's end marker.
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
    """Convert a Pillow image of any colour mode to RGB.

    Raises:
        ValueError: Images with this colour mode cannot be converted to RGB.
    """
    if image.mode == "F":
        raise ValueError("the pixels are floating-point numbers; convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):  # Pillow's own conversion would clip 16-bit grey values.
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image.convert("RGB")


def _opencv(data: bytes, flags: int) -> np.ndarray | None:
    """Decode a file with OpenCV; return None if OpenCV cannot decode it."""
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # OpenCV raises an error for images that exceed its pixel limit.
        return None


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Reduce 16-bit pixels to uint8: the high byte, or the low byte if no pixel exceeds 255."""
    largest = pixels.max()
    if largest > 65535 or pixels.min() < 0:
        raise ValueError("the pixels have 32 bits; convert the image to 8 or 16 bits")
    return (pixels.astype(np.int64) >> 8 if largest > 255 else pixels).astype(np.uint8)


def _refuse_more_channels(data: bytes) -> None:
    """Raise ValueError if a TIFF has channels other than its colours and alpha."""
    tags = _tiff_tags(data)
    channels, kind, extra = tags.get(277, 1), tags.get(262, 1), tags.get(338, ())
    colors = {2: 3, 5: 4, 6: 3, 8: 3}.get(kind, 1)
    alpha = sum(value in (1, 2) for value in (extra if isinstance(extra, tuple) else (extra,)))
    if channels > colors + alpha:
        raise ValueError(f"the image has {channels} channels; export it as a grey or RGB image")


def _tiff_tags(data: bytes) -> dict[int, Any]:
    """Return the tags of a TIFF or BigTIFF, or an empty dict for other or damaged files."""
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    # Use Pillow's tag reader, because Image.open rejects some TIFFs that OpenCV decodes.
    with contextlib.suppress(Exception):
        is_big = data[2:3] == b"+" or data[3:4] == b"+"
        tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if is_big else 8])
        file = io.BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return dict(tags)
    return {}


def _is_wide(data: bytes) -> bool:
    """Return whether Pillow would reduce a PNG or TIFF with several 16-bit channels to 8 bits."""
    if data.startswith(_PNG_START):
        return data[24:25] == b"\x10" and data[25:26] in (b"\x02", b"\x04", b"\x06")
    bits = _tiff_tags(data).get(258, 8)
    return isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8


def decode_image_for_mask(data: bytes, shape: tuple[int, int], reduction: int = 1) -> np.ndarray:
    """Decode an image in the orientation that matches its mask.

    By default, the EXIF orientation is applied, as in an image viewer. The orientation is ignored
    if the image matches the size of its mask only when it is not rotated.

    Args:
        data: Content of the image file.
        shape: Height and width of the mask.
        reduction: Factor by which to reduce the size of a JPEG: 1, 2, 4 or 8.

    Returns:
        np.ndarray: (ceil(H / reduction), ceil(W / reduction), 3) uint8 RGB.

    Raises:
        ValueError: The image cannot be decoded, or its size differs from the mask's.
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
        raise ValueError(
            f"the image is {width}x{height}, but its mask is {shape[1]}x{shape[0]}; "
            "export both at the same size"
        )
    return stored


def decode_mask(data: bytes, max_value: int = 255) -> np.ndarray:
    """Decode a mask of class labels.

    Args:
        data: Content of the mask file in a lossless format. The mask must be grey, have three equal
            channels, or have a palette. With a palette, the indices are the labels.
        max_value: Largest allowed label, at most 65535.

    Returns:
        np.ndarray: (H, W) labels as stored in the file: uint8, or uint16 if any label exceeds 255.

    Raises:
        ValueError: The file is not an image, is truncated or does not contain labels.
    """
    depth, color = data[24:25], data[25:26]
    # In a PNG header, these bytes mean an 8-bit or 16-bit greyscale image.
    grey = depth + color in (b"\x08\x00", b"\x10\x00")
    if data.startswith(_PNG_START) and data.endswith(_PNG_END) and grey:
        mask = _opencv(data, cv2.IMREAD_UNCHANGED)
        if mask is not None and mask.ndim == 2:
            return mask if mask.dtype == np.uint8 else _narrowed(mask, max_value)
    image = _decode(data)
    if image.format in ("JPEG", "MPO"):
        raise ValueError("the mask is a JPEG, whose compression changes labels; export it as PNG")
    mask = np.asarray(image)
    if _is_wide(data):
        wide = _opencv(data, cv2.IMREAD_UNCHANGED)
        if wide is None or wide.ndim != 3:
            raise ValueError("the mask has several 16-bit channels; export it with one channel")
        mask = wide
    if mask.ndim == 3:
        if image.mode not in ("LA", "PA") and (mask[..., :3] != mask[..., :1]).any():
            raise ValueError(
                f"the mask contains colours ({image.mode}), but labels are expected; to use "
                "colours, list them in a description, as in labels: [[128, 64, 128]]"
            )
        mask = mask[..., 0]
    if image.format == "PNG" and color == b"\x00" and depth in (b"\x02", b"\x04"):
        # Pillow scales 2-bit and 4-bit grey levels to the range 0-255, so undo the scaling.
        mask = mask // (255 // (2 ** depth[0] - 1))
    return _narrowed(mask, max_value)


def _narrowed(mask: np.ndarray, max_value: int) -> np.ndarray:
    """Convert labels to uint8, or to uint16 if any label exceeds 255.

    Raises:
        ValueError: A value is negative, is not an integer or exceeds `max_value`.
    """
    if mask.dtype.kind == "f" and (mask % 1 != 0).any():
        raise ValueError("the mask contains fractions; export it with integer labels")
    largest = mask.max()
    if mask.min() < 0 or largest > max_value:
        wrong = mask.min() if mask.min() < 0 else largest
        raise ValueError(
            f"the mask contains label {wrong}; labels must be between 0 and {max_value}"
        )
    return np.ascontiguousarray(mask, dtype=np.uint8 if largest <= 255 else np.uint16)


def decode_colors(data: bytes) -> np.ndarray:
    """Decode a mask that encodes values as colours.

    Args:
        data: Content of the mask file in a lossless format, with 8 bits per channel: grey, palette
            or RGB. An alpha channel is dropped.

    Returns:
        np.ndarray: (H, W) int32 values, red + 256 * green + 65536 * blue.

    Raises:
        ValueError: The file is not a lossless 8-bit image or is truncated.
    """
    is_whole = data.startswith(_PNG_START) and data.endswith(_PNG_END)
    # In a PNG header, these bytes mean an 8-bit RGB or RGBA image.
    if is_whole and data[24:26] in (b"\x08\x02", b"\x08\x06"):
        # If the fast decoder fails, fall back to Pillow, whose error message names the problem.
        with contextlib.suppress(RuntimeError):
            pixels = (_fast_decoder() if data[25] == 2 else _decode_png)(data)
            packed = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA).view(np.int32)[..., 0]
            return np.bitwise_and(packed, 0xFFFFFF, out=packed)
    image = _decode(data)
    if image.format in ("JPEG", "MPO"):
        raise ValueError("the mask is a JPEG, whose compression changes colours; export it as PNG")
    if _is_wide(data):
        raise ValueError("the mask has 16-bit colours; export it with 8 bits per channel")
    pixels = np.asarray(image.convert("RGB")).astype(np.int32)
    return pixels[..., 0] | pixels[..., 1] << 8 | pixels[..., 2] << 16


@functools.cache
def _fast_decoder() -> Callable[[bytes], np.ndarray]:
    """Return the fastest installed decoder for RGB PNG files.

    The optional package kornia-rs decodes twice as fast as torchvision.
    """
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        return _decode_png

    def decode(data: bytes) -> np.ndarray:
        width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
        # kornia-rs allocates memory for whatever size the header declares, so reject huge sizes
        # first.
        if width * height > (Image.MAX_IMAGE_PIXELS or 0):
            raise RuntimeError("too large")
        try:
            return decode_image_png_u8(data, (height, width), "rgb")
        except Exception as error:  # kornia-rs has no exception type of its own.
            raise RuntimeError(str(error)) from error

    return decode


def _decode_png(data: bytes) -> np.ndarray:
    """Decode an 8-bit PNG to (H, W, 3) RGB."""
    # Import torchvision only here, so that predict.py can start without it.
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
    return decode_png(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _decode(data: bytes) -> Image.Image:
    """Decode a file with Pillow.

    Raises:
        ValueError: Pillow cannot decode the file.
    """
    if not data:
        raise ValueError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except Image.UnidentifiedImageError:
        raise ValueError("unknown image format") from None
    except Exception as error:  # Pillow's plugins can raise any type of exception.
        raise ValueError(f"cannot be decoded: {one_line(error)}") from None
    return image


ImageInput = str | os.PathLike | np.ndarray | Image.Image


def read_image(image: ImageInput) -> np.ndarray:
    """Read an image as an (H, W, 3) uint8 RGB array and apply its EXIF orientation.

    Args:
        image: Path, (H, W, 3) uint8 array or Pillow image. Only an image read from a path is
            rotated by its EXIF orientation.

    Raises:
        ValueError: The input is not an image.
        OSError: The file cannot be read.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"got an array of type {image.dtype} and shape {image.shape}; expected type "
                "uint8 and shape (H, W, 3)"
            )
        return image
    if isinstance(image, Image.Image):
        return np.array(_rgb(image))
    return decode_image(Path(image).read_bytes())
