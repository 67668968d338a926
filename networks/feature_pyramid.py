"""A feature pyramid for plain vision transformers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d


class SimpleFeaturePyramid(nn.Module):
    """A pyramid that turns a vision transformer's last features into features with strides 4 and 8.

    This is the simple feature pyramid of ViTDet (Li et al. 2022, https://arxiv.org/abs/2203.16527).
    The last two convolutions are omitted, because the DeepLabV3+ head begins with its own
    convolutions. For 14-pixel patches, the strides are 3.5 and 7.

    Args:
        channels: Number of channels D of the transformer's features.

    Shape:
        [(N, D, H / 16, W / 16)] -> [(N, D // 4, H / 4, W / 4), (N, D // 2, H / 8, W / 8)]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        self.channels = (quarter, half)
        self.stride_4 = nn.Sequential(
            nn.ConvTranspose2d(channels, half, 2, 2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
            LayerNorm2d(quarter),
        )
        self.stride_8 = nn.Sequential(nn.ConvTranspose2d(channels, half, 2, 2), LayerNorm2d(half))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the stride-4 and stride-8 features; see the class for their shapes."""
        return [self.stride_4(features[-1]), self.stride_8(features[-1])]
