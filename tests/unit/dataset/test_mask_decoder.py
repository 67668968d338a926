"""Tests of dataset/mask_decoder.py."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.description import (
    pack,
)
from dataset.mask_decoder import UnknownValues
from tests.support.description import described, encode
from tests.support.layouts import COLORS


def test_thousands_of_labels_are_merged_into_classes() -> None:
    rng = np.random.default_rng(0)
    assignment = rng.integers(0, 254, 5000)  # the class of each mask value; 0 means ignored
    assignment[:254] = np.arange(254)
    classes = {f"c{k}": {"labels": np.flatnonzero(assignment == k).tolist()} for k in range(1, 254)}
    masks = described(classes, np.flatnonzero(assignment == 0).tolist())
    values = rng.integers(0, 5000, (64, 80)).astype(np.uint16)
    for suffix in (".png", ".tif"):
        decoded = pickle.loads(pickle.dumps(masks)).decode(encode(values, suffix))
        assert decoded.dtype == np.uint8
        np.testing.assert_array_equal(decoded, assignment[values])
    eight_bits = (values % 256).astype(np.uint8)
    np.testing.assert_array_equal(masks.decode(encode(eight_bits)), assignment[eight_bits])
    with pytest.raises(UnknownValues, match=r"^0\.02% of its pixels have value 5000, which"):
        values[3, 3] = 5000
        masks.decode(encode(values))


def test_similar_mask_colours_are_distinguished() -> None:
    rng = np.random.default_rng(1)
    colors = np.unique(rng.integers(0, 256, (300, 3)), axis=0)[:250]
    rng.shuffle(colors)
    classes = {f"c{k}": {"labels": [color]} for k, color in enumerate(colors[1:].tolist())}
    masks = described(classes, [colors[0].tolist()])
    index = rng.integers(0, len(colors), (40, 50))
    picture = Image.fromarray(colors[index].astype(np.uint8))
    with_alpha = picture.copy()
    with_alpha.putalpha(Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)))
    for image in (picture, with_alpha):
        for suffix in ("PNG", "TIFF"):
            file = io.BytesIO()
            image.save(file, suffix)
            np.testing.assert_array_equal(masks.decode(file.getvalue()), index)
    near = np.array(picture)
    near[5, 7] ^= 1
    while pack(*near[5, 7].tolist()) in masks.values:
        near[5, 7, 0] += 1
    with pytest.raises(UnknownValues) as error:
        masks.decode(encode(near[..., ::-1]))
    assert str(error.value).startswith(
        f"0.05% of its pixels have colour {tuple(near[5, 7].tolist())}, which"
    )


def test_palette_masks_are_read_by_index_or_by_colour(tmp_path: Path) -> None:
    index = np.random.default_rng(2).integers(0, 3, (9, 11)).astype(np.uint8)
    image = Image.fromarray(index)
    image.putpalette(COLORS.ravel().tolist())
    image.save(tmp_path / "mask.png")
    data = (tmp_path / "mask.png").read_bytes()
    by_index = described({"a": 1, "b": 2}, 0)
    by_color = described({"a": [COLORS[1].tolist()], "b": [COLORS[2].tolist()]}, [[0, 0, 0]])
    np.testing.assert_array_equal(by_index.decode(data), index)
    np.testing.assert_array_equal(by_color.decode(data), index)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            encode(np.zeros((4, 4, 3), np.uint8), ".jpg"),
            "the mask is a JPEG, whose compression changes colours",
        ),
        (encode(np.zeros((4, 4, 3), np.uint16)), "the mask has 16-bit colours"),
        (encode(np.zeros((40, 40, 3), np.uint8))[:60], "cannot be decoded|unknown image format"),
        (b"", "the file is empty"),
    ],
)
def test_masks_without_valid_colours_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        described({"a": [[1, 1, 1]], "b": [[2, 2, 2]]}, [[0, 0, 0]]).decode(data)
