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
    decode_mask,
    decode_photo,
    read_photo,
)
from tests.support.transforms import PHOTO, blobs, difference, encode, photo


def encode_16_bit(array: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, array.astype(np.uint16))[1].tobytes()


GRAY = PHOTO.convert("L")
GRAY_16 = np.asarray(GRAY).astype(np.uint16) * 257


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(PHOTO, "JPEG", quality=95), PHOTO),
        (encode(PHOTO, "JPEG", quality=95, progressive=True), PHOTO),
        (encode(PHOTO, "JPEG", quality=95) + bytes(20), PHOTO),  # cameras append things
        (encode(GRAY, "JPEG", quality=95), GRAY),
        (encode(PHOTO.convert("CMYK"), "JPEG", quality=95), PHOTO),
        (encode(PHOTO.convert("P", palette=Image.Palette.ADAPTIVE)), PHOTO.quantize(256)),
        (encode(PHOTO.convert("RGBA")), PHOTO),
        (encode(PHOTO.convert("LA")), GRAY),
        (encode(PHOTO.convert("1")), PHOTO.convert("1")),
        (encode(PHOTO, "TIFF"), PHOTO),
        (encode(PHOTO, "WEBP", lossless=True), PHOTO),
        (encode(PHOTO, "BMP"), PHOTO),
        (encode_16_bit(np.asarray(PHOTO)[..., ::-1].astype(int) * 257, ".png"), PHOTO),
        (encode_16_bit(GRAY_16, ".png"), GRAY),
        (encode_16_bit(GRAY_16, ".tif"), GRAY),
        (encode_16_bit(np.asarray(GRAY), ".png"), GRAY),  # in 16 bits, but of eight
        (encode_16_bit(np.asarray(GRAY), ".tif"), GRAY),
        (encode(PHOTO.convert("RGBA"), "TIFF"), PHOTO),
        (encode(PHOTO.convert("LA"), "TIFF"), GRAY),
        (encode(PHOTO.convert("CMYK"), "TIFF"), PHOTO),
    ],
)
def test_decodes_photos_of_every_kind(data: bytes, expected: Image.Image) -> None:
    image = decode_image(data)
    assert image.dtype == np.uint8
    error = difference(image, np.asarray(expected.convert("RGB")))
    assert error.mean() < 3  # what JPEG loses, mostly of the colours


def test_opencv_5_takes_the_flags() -> None:
    """It refuses IMREAD_COLOR beside COLOR_RGB."""
    assert not any(flags & cv2.IMREAD_COLOR for flags in REDUCTIONS.values())


def tiff(pixels: np.ndarray, photometric: int, *extra: int) -> bytes:
    """A TIFF of any number of channels, which neither Pillow nor OpenCV writes."""
    height, width, channels = pixels.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    tags = {256: width, 257: height, 258: (8,) * channels, 259: 1, 262: photometric, 277: channels}
    for tag, value in {**tags, 278: height, 279: pixels.nbytes, 273: 0}.items():
        directory[tag] = value
    if extra:
        directory[338] = extra
    # Pillow moves the pixels' place (273) to behind the tags.
    return b"II*\0" + (8).to_bytes(4, "little") + directory.tobytes(8) + pixels.tobytes()


@pytest.mark.parametrize(
    ("channels", "photometric", "extra"), [(4, 2, (0,)), (5, 2, (0, 0)), (5, 2, (2, 0)), (8, 1, ())]
)
def test_more_channels_are_refused(channels: int, photometric: int, extra: tuple) -> None:
    data = tiff(np.full((6, 5, channels), 9, np.uint8), photometric, *extra)
    with pytest.raises(ValueError, match=f"^the image has {channels} channels; export it"):
        decode_image(data)
    with pytest.raises(ValueError, match=r"expected type uint8 and shape \(H, W, 3\)"):
        read_photo(np.zeros((6, 5, channels), np.uint8))


def test_an_alpha_channel_is_left_aside() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)
    assert (decode_image(tiff(pixels, 2, 2)) == pixels[..., :3]).all()
    grey = decode_image(tiff(pixels[..., :1], 1))
    assert grey.shape == (6, 5, 3) and (grey == pixels[..., :1]).all()


def test_sixteen_bits_keep_the_higher_eight() -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (9, 7, 3)).astype(np.uint16)
    assert (decode_image(encode_16_bit(pixels[..., ::-1], ".png")) == pixels >> 8).all()
    for suffix in (".png", ".tif"):
        data = encode_16_bit(pixels[..., 0], suffix)
        for grey in (decode_image(data), read_photo(Image.open(io.BytesIO(data)))):
            assert (grey == pixels[..., :1] >> 8).all()
    floats = encode(Image.fromarray(np.random.default_rng(0).random((4, 4), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        decode_image(floats)
    with pytest.raises(ValueError, match="floating-point"):
        read_photo(Image.open(io.BytesIO(floats)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turns_photos_as_exif_says_if_the_mask_is_so(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(PHOTO, "JPEG", quality=95, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    stored = np.asarray(Image.open(io.BytesIO(data)))
    assert (decode_image(data) == upright).all()
    assert (decode_photo(data, upright.shape[:2]) == upright).all()
    # A mask that only fits the photo as stored was drawn on that.
    expected = upright if upright.shape == stored.shape else stored
    assert (decode_photo(data, stored.shape[:2]) == expected).all()


def test_photo_and_mask_of_different_size() -> None:
    data = encode(PHOTO, "JPEG")
    with pytest.raises(ValueError, match="the image is 61x45, but its mask is 60x45"):
        decode_photo(data, (45, 60))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 96), (61, 43)])
@pytest.mark.parametrize("more", [b"", b"SEFT\0"])  # as phones append, which leaves it to Pillow
def test_decodes_jpegs_smaller(reduction: int, shape: tuple[int, int], more: bytes) -> None:
    image = photo(*shape)
    small = decode_photo(encode(image, "JPEG", quality=95) + more, shape, reduction)
    expected = Image.fromarray(image).reduce(reduction)  # means of blocks
    assert difference(small, np.asarray(expected)).mean() < 4


MASK = blobs(37, 52, classes=11)
PALETTE = np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes()


def with_palette(mask: np.ndarray) -> Image.Image:
    image = Image.fromarray(mask)
    image.putpalette(PALETTE)
    return image


def with_few_bits(mask: np.ndarray, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write: one with a palette, without it."""
    data = encode(with_palette(mask), bits=bits)
    assert data[24] == bits
    gray = bytearray(data)
    gray[25] = 0  # colour type grey
    gray[29:33] = zlib_crc(gray[12:29])
    start = gray.index(b"PLTE") - 4
    length = int.from_bytes(gray[start : start + 4], "big")
    del gray[start : start + 12 + length]
    return bytes(gray)


def zlib_crc(data: bytes) -> bytes:
    import zlib

    return zlib.crc32(data).to_bytes(4, "big")


def of_many_pixels() -> bytes:
    """A grey PNG that says it is 100,000 pixels wide and high, more than OpenCV takes."""
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
        (with_few_bits(MASK, 4), MASK),
        (with_few_bits(MASK % 4, 2), MASK % 4),
        (with_few_bits(MASK % 2, 1), MASK % 2),
        (encode(MASK % 2 > 0), MASK % 2),
        (encode(np.stack([MASK] * 3, -1)), MASK),
        (encode(np.stack([MASK] * 3 + [MASK * 0], -1)), MASK),
        (encode(np.stack([MASK, MASK * 0], -1)), MASK),  # with alpha
        (encode_16_bit(MASK, ".png"), MASK),
        (encode(MASK, "TIFF"), MASK),
        (encode(np.float32(MASK), "TIFF"), MASK),
        (encode(MASK, "BMP"), MASK),
        (encode(with_palette(MASK), "GIF"), MASK),
    ],
)
def test_decodes_masks_of_every_kind(data: bytes, expected: np.ndarray) -> None:
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
        (of_many_pixels(), "exceeds limit"),
        (b"II*\0", "unknown image format"),
        (b"MM\0*\0\0", "unknown image format"),
    ],
)
def test_refuses_what_is_no_image(decode, data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        decode(data)
    assert "\n" not in str(error.value)


def test_refuses_a_photo_that_is_cut_short() -> None:
    data = encode(PHOTO, "JPEG")
    with pytest.raises(ValueError, match=r"(?i)truncated"):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encode(PHOTO), r"the mask contains colours \(RGB\)"),
        (encode(GRAY, "JPEG"), "the mask is a JPEG, whose compression changes labels"),
        (encode_16_bit(MASK.astype(int) + 300, ".png"), "label 311"),
        (encode(np.float32(MASK) / 11, "TIFF"), "the mask contains fractions"),
        (
            encode(np.where(MASK, np.float32(MASK), np.float32(np.nan)), "TIFF"),
            "the mask contains fractions",
        ),
    ],
)
def test_refuses_masks_without_labels(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_mask(data)


def wide(kind: str, labels: np.ndarray) -> bytes:
    """Encode labels as 16 bits in several channels."""
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
    """Encode a PNG of 16-bit grey and alpha, which neither Pillow nor OpenCV writes."""
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
def test_masks_of_several_channels_in_16_bits_keep_their_labels(kind: str) -> None:
    labels = np.arange(48).reshape(6, 8) % 12
    assert (decode_mask(wide(kind, labels)) == labels).all()
    assert (decode_mask(wide(kind, labels + 300), 1000) == labels + 300).all()
    with pytest.raises(ValueError, match="the mask has 16-bit colours"):
        decode_colors(wide(kind, labels))


def test_colours_of_16_bits_are_no_labels() -> None:
    pixels = np.zeros((6, 8, 3), np.uint16)
    pixels[2:, :, 1] = 7
    with pytest.raises(ValueError, match="the mask contains colours"):
        decode_mask(cv2.imencode(".png", pixels)[1].tobytes())


@pytest.mark.parametrize("bands", [3, 4])
def test_a_bigtiff_of_four_bands_is_refused(bands: int) -> None:
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
