"""Tests of dataset/decoding.py."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from dataset.decoding import (
    REDUCTIONS,
    decode_colors,
    decode_image,
    decode_image_for_mask,
    decode_mask,
    read_image,
)
from tests.support.transforms import IMAGE, blobs, difference, encode, random_image


def encode_16_bit(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array.astype(np.uint16))[1].tobytes()


GRAY = IMAGE.convert("L")
GRAY_16 = np.asarray(GRAY).astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(IMAGE, "JPEG", quality=95), IMAGE),
        (encode(IMAGE, "JPEG", quality=95, progressive=True), IMAGE),
        (encode(IMAGE, "JPEG", quality=95) + bytes(20), IMAGE),  # cameras append extra bytes
        (encode(GRAY, "JPEG", quality=95), GRAY),
        (encode(IMAGE.convert("CMYK"), "JPEG", quality=95), IMAGE),
        (encode(IMAGE.convert("P", palette=Image.Palette.ADAPTIVE)), IMAGE.quantize(256)),
        (encode(IMAGE.convert("RGBA")), IMAGE),
        (encode(IMAGE.convert("LA")), GRAY),
        (encode(IMAGE.convert("1")), IMAGE.convert("1")),
        (encode(IMAGE, "TIFF"), IMAGE),
        (encode(IMAGE, "WEBP", lossless=True), IMAGE),
        (encode(IMAGE, "BMP"), IMAGE),
        (encode_16_bit(np.asarray(IMAGE)[..., ::-1].astype(int) * 257, ".png"), IMAGE),
        (encode_16_bit(GRAY_16, ".png"), GRAY),
        (encode_16_bit(GRAY_16, ".tif"), GRAY),
        (encode_16_bit(np.asarray(GRAY), ".png"), GRAY),  # 16-bit file with 8-bit values
        (encode_16_bit(np.asarray(GRAY), ".tif"), GRAY),
        (encode(IMAGE.convert("RGBA"), "TIFF"), IMAGE),
        (encode(IMAGE.convert("LA"), "TIFF"), GRAY),
        (encode(IMAGE.convert("CMYK"), "TIFF"), IMAGE),
    ],
)
def test_images_of_every_format_are_decoded(data: bytes, expected: Image.Image) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    error = difference(image, np.asarray(expected.convert("RGB")))
    assert error.mean() < 3  # JPEG is lossy, mostly in the colours


def test_decoding_flags_work_with_opencv_5() -> None:
    """OpenCV 5 rejects IMREAD_COLOR together with COLOR_RGB."""
    assert not any(flags & cv2.IMREAD_COLOR for flags in REDUCTIONS.values())


def tiff(pixels: np.ndarray, photometric: int, *extra: int) -> bytes:
    """Return a TIFF with any number of channels, which neither Pillow nor OpenCV can write."""
    height, width, channels = pixels.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    tags = {256: width, 257: height, 258: (8,) * channels, 259: 1, 262: photometric, 277: channels}
    for tag, value in {**tags, 278: height, 279: pixels.nbytes, 273: 0}.items():
        directory[tag] = value
    if extra:
        directory[338] = extra
    # Pillow sets tag 273, the offset of the pixels, to the position after the tags.
    return b"II*\0" + (8).to_bytes(4, "little") + directory.tobytes(8) + pixels.tobytes()


@pytest.mark.parametrize(
    ("channels", "photometric", "extra"), [(4, 2, (0,)), (5, 2, (0, 0)), (5, 2, (2, 0)), (8, 1, ())]
)
def test_images_with_more_than_three_channels_are_rejected(
    channels: int, photometric: int, extra: tuple
) -> None:
    data = tiff(np.full((6, 5, channels), 9, np.uint8), photometric, *extra)
    with pytest.raises(ValueError, match=f"^the image has {channels} channels; export it"):
        decode_image(data)
    with pytest.raises(ValueError, match=r"expected type uint8 and shape \(H, W, 3\)"):
        read_image(np.zeros((6, 5, channels), np.uint8))


def test_alpha_channel_is_ignored() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    assert (decode_image(tiff(pixels, 2, 2)) == pixels[..., :3]).all()
    grey = decode_image(tiff(pixels[..., :1], 1))
    assert grey.shape == (6, 5, 3) and (grey == pixels[..., :1]).all()


def test_sixteen_bit_images_keep_the_high_byte() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    assert (decode_image(encode_16_bit(pixels[..., ::-1], ".png")) == pixels >> 8).all()
    for suffix in (".png", ".tif"):
        data = encode_16_bit(pixels[..., 0], suffix)
        for grey in (decode_image(data), read_image(Image.open(io.BytesIO(data)))):
            assert (grey == pixels[..., :1] >> 8).all()
    floats = encode(Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(floats)
    with pytest.raises(ValueError, match="floating-point"):
        read_image(Image.open(io.BytesIO(floats)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_if_the_mask_has_the_rotated_size(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(IMAGE, "JPEG", quality=95, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert (decode_image(data) == upright).all()
    assert (decode_image_for_mask(data, upright.shape[:2]) == upright).all()
    # A mask that fits only the stored image was drawn on the unrotated image.
    expected = upright if upright.shape == stored.shape else stored
    assert (decode_image_for_mask(data, stored.shape[:2]) == expected).all()


def test_image_and_mask_of_different_sizes_are_rejected() -> None:
    data = encode(IMAGE, "JPEG")
    with pytest.raises(ValueError, match="the image is 61x45, but its mask is 60x45"):
        decode_image_for_mask(data, (45, 60))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 96), (61, 43)])
# Phones append the bytes SEFT to their JPEGs, so Pillow decodes the files.
@pytest.mark.parametrize("more", [b"", b"SEFT\0"])
def test_jpegs_are_decoded_at_reduced_size(
    reduction: int, shape: tuple[int, int], more: bytes
) -> None:
    image = random_image(*shape)
    small = decode_image_for_mask(encode(image, "JPEG", quality=95) + more, shape, reduction)
    expected = Image.fromarray(image).reduce(reduction)  # Pillow averages blocks of pixels
    assert difference(small, np.asarray(expected)).mean() < 4


MASK = blobs(37, 52, classes=11)
PALETTE = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes()


def with_palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    return image


def low_bit_png(mask: np.ndarray, bits: int) -> bytes:
    """Return a grey PNG with 1, 2 or 4 bits per pixel, made from a PNG with a palette."""
    data = encode(with_palette(mask), bits=bits)
    assert data[24] == bits
    gray = bytearray(data)
    gray[25] = 0  # set the colour type to grey
    gray[29:33] = zlib_crc(gray[12:29])
    start = gray.index(b"PLTE") - 4
    length = int.from_bytes(gray[start : start + 4], "big")
    del gray[start : start + 12 + length]
    return bytes(gray)


def zlib_crc(data: bytes) -> bytes:
    import zlib

    return zlib.crc32(data).to_bytes(4, "big")


def oversized_png() -> bytes:
    """Return a grey PNG with a header of 100,000 x 100,000 pixels, above OpenCV's limit."""
    data = bytearray(encode(np.zeros((2, 2), np.uint8)))
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    data[29:33] = zlib_crc(data[12:29])
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(MASK), MASK),
        (encode(with_palette(MASK)), MASK),
        (encode(with_palette(MASK), bits=4), MASK),
        (low_bit_png(MASK, 4), MASK),
        (low_bit_png(MASK % 4, 2), MASK % 4),
        (low_bit_png(MASK % 2, 1), MASK % 2),
        (encode(MASK % 2 > 0), MASK % 2),
        (encode(np.stack([MASK] * 3, -1)), MASK),
        (encode(np.stack([MASK] * 3 + [MASK * 0], -1)), MASK),
        (encode(np.stack([MASK, MASK * 0], -1)), MASK),  # grey and alpha
        (encode_16_bit(MASK, ".png"), MASK),
        (encode(MASK, "TIFF"), MASK),
        (encode(np.float32(MASK), "TIFF"), MASK),
        (encode(MASK, "BMP"), MASK),
        (encode(with_palette(MASK), "GIF"), MASK),
    ],
)
def test_masks_of_every_format_are_decoded(data: bytes, expected: np.ndarray) -> None:
    mask = decode_mask(data)
    assert mask.dtype == np.uint8
    assert mask.flags.c_contiguous
    assert (mask == expected).all()


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "unknown image format"),
        (encode(GRAY)[:500], "truncated"),
        (encode(GRAY)[:500] + b"\0\0\0\0IEND\xaeB`\x82", "truncated"),
        (encode(GRAY)[:300] + b"damage" + encode(GRAY)[306:], "cannot be decoded"),
        (oversized_png(), "exceeds limit"),
        (b"II*\0", "unknown image format"),
        (b"MM\0*\0\0", "unknown image format"),
    ],
)
def test_invalid_image_file_gives_a_one_line_error(decode, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_truncated_jpeg_is_rejected() -> None:
    data = encode(IMAGE, "JPEG")
    with pytest.raises(ValueError, match=r"(?i)truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(IMAGE), r"the mask contains colours \(RGB\)"),
        (encode(GRAY, "JPEG"), "the mask is a JPEG, whose compression changes labels"),
        (encode_16_bit(MASK.astype(int) + 300, ".png"), "label 311"),
        (encode(np.float32(MASK) / 11, "TIFF"), "the mask contains fractions"),
        (
            encode(np.where(MASK, np.float32(MASK), np.float32(np.nan)), "TIFF"),
            "the mask contains fractions",
        ),
    ],
)
def test_masks_without_integer_labels_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_mask(data)


def encode_wide(kind: str, labels: np.ndarray) -> bytes:
    """Encode labels as an image with several 16-bit channels."""
    three = np.stack([labels] * 3, -1).astype(np.uint16)
    if kind == "TIFF, RGB":
        return cv2.imencode(".tif", three)[1].tobytes()
    if kind == "PNG, RGB":
        return cv2.imencode(".png", three)[1].tobytes()
    if kind == "PNG, RGBA":
        alpha = np.full((*labels.shape, 1), 65535, np.uint16)
        return cv2.imencode(".png", np.concatenate([three, alpha], -1))[1].tobytes()
    return grey_with_alpha(labels)


def grey_with_alpha(labels: np.ndarray) -> bytes:
    """Encode a 16-bit grey PNG with alpha, which neither Pillow nor OpenCV can write."""
    height, width = labels.shape
    pixels = np.stack([labels, np.full_like(labels, 65535)], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("kind", ["PNG, RGB", "PNG, RGBA", "PNG, grey and alpha", "TIFF, RGB"])
def test_multichannel_16_bit_masks_keep_their_labels(kind: str) -> None:
    labels = np.arange(48).reshape(6, 8) % 12
    assert (decode_mask(encode_wide(kind, labels)) == labels).all()
    assert (decode_mask(encode_wide(kind, labels + 300), 1000) == labels + 300).all()
    with pytest.raises(ValueError, match="the mask has 16-bit colours"):
        decode_colors(encode_wide(kind, labels))


def test_sixteen_bit_colour_masks_are_rejected_as_labels() -> None:
    pixels = np.zeros((6, 8, 3), np.uint16)
    pixels[2:, :, 1] = 7
    with pytest.raises(ValueError, match="the mask contains colours"):
        decode_mask(cv2.imencode(".png", pixels)[1].tobytes())


@pytest.mark.parametrize("bands", [3, 4])
def test_bigtiff_with_four_bands_is_rejected(bands: int) -> None:
    pixels = np.arange(6 * 8 * bands, dtype=np.uint8).reshape(6, 8, bands)
    tags = [(256, 8), (257, 6), (259, 1), (262, 2), (277, bands), (278, 6), (279, pixels.size)]
    start = 16 + 8 + 20 * (len(tags) + 2) + 8
    entries = [(number, 3, 1, value) for number, value in tags]
    entries += [(258, 3, bands, None), (273, 3, 1, start)]
    body = struct.pack("<Q", len(entries))
    for number, kind, count, value in sorted(entries):
        field = struct.pack(f"<{count}H", *([8] * count if value is None else [value]))
        body += struct.pack("<HHQ", number, kind, count) + field.ljust(8, b"\0")
    header = b"II" + struct.pack("<HHHQ", 43, 8, 0, 16)
    data = header + body + struct.pack("<Q", 0) + pixels.tobytes()
    if bands == 4:
        with pytest.raises(
            ValueError, match="the image has 4 channels; export it as a grey or RGB"
        ):
            decode_image(data)
    else:
        assert (decode_image(data) == pixels).all()
