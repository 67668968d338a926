"""Tests of segmentation/views.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from predict import highest_class, window_starts


@pytest.mark.parametrize("size", [(512, 683), (20, 31), (100, 50)])
def test_predicted_class_matches_two_resizes_and_an_argmax(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("segmentation.views.CPU_ROWS", 7)
    torch.manual_seed(0)
    views = [(torch.randn(3, 8, 12), (32, 45)), (torch.randn(3, 16, 22), (64, 88))]
    full = [
        F.interpolate(F.interpolate(logits[None], seen, mode="bilinear"), size, mode="bilinear")[0]
        for logits, seen in views
    ]
    assert torch.equal(highest_class(views[:1], size), full[0].argmax(0))
    mean = sum(scores.softmax(0) for scores in full)
    assert torch.equal(highest_class(views, size), mean.argmax(0))


def test_sliding_windows_cover_the_whole_image():
    for length in range(8, 1500, 8):
        starts = window_starts(length, 512)
        covered = np.zeros(length, int)
        for start in starts:
            covered[start : start + 512] += 1
        assert covered.min() >= 1 and max(starts) == max(length - 512, 0)
        assert all(start % 8 == 0 for start in starts)
