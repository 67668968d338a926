"""Tests of segmentation/losses_triton.py that need no kernels; see tests/system for the others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from segmentation.losses_triton import _constants


@pytest.mark.parametrize("classes", [2, 3, 16, 17, 150, 256])
def test_two_blocks_cover_all_classes_with_little_padding(classes: int) -> None:
    logits = torch.empty(1, classes, 4, 4, device="meta")
    constants = _constants(logits, 1, None, 16)
    head, tail = constants["HEAD"], constants["TAIL"]
    assert head < classes <= head + tail < 2 * classes
    assert all(size & (size - 1) == 0 for size in (head, tail))  # powers of 2


@pytest.mark.parametrize("width", range(3, 41))
def test_cells_between_logits_have_room_for_all_their_pixels(width: int) -> None:
    """A cell holds the pixels that lie between two neighbouring logits."""
    constants = _constants(torch.empty(1, 5, 4, 4, device="meta"), 1, None, width)
    positions = (torch.arange(width) + 0.5) * 4 / width - 0.5
    pixels = torch.bincount(positions.floor().long() + 1)
    assert constants["SUPPORT"] >= pixels.max()
