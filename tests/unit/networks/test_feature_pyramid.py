"""Tests of networks/feature_pyramid.py."""

import pytest
import torch

from networks.feature_pyramid import SimpleFeaturePyramid


def test_pyramid_upsamples_the_last_features_by_four_and_two() -> None:
    pyramid = SimpleFeaturePyramid(16)
    maps = pyramid([torch.zeros(2, 16, 7, 7), torch.randn(2, 16, 3, 5)])
    assert [tuple(m.shape) for m in maps] == [(2, 4, 12, 20), (2, 8, 6, 10)]
    assert pyramid.channels == (4, 8)


def test_every_pyramid_weight_gets_a_gradient() -> None:
    pyramid = SimpleFeaturePyramid(16)
    weights = [torch.randn(m.shape) for m in pyramid([torch.zeros(1, 16, 2, 2)])]
    maps = pyramid([torch.randn(1, 16, 2, 2)])
    torch.stack([(m * w).sum() for m, w in zip(maps, weights)]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in pyramid.parameters())


@pytest.mark.parametrize("channels", [192, 384, 768])
def test_pyramid_levels_have_a_quarter_and_a_half_of_the_channels(channels: int) -> None:
    assert SimpleFeaturePyramid(channels).channels == (channels // 4, channels // 2)
