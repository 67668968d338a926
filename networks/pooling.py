"""The head's pooling over the whole image."""

from __future__ import annotations

from torch import Tensor, nn


class ImagePool(nn.Sequential):
    """What it is made of, to one pixel; on a GPU, that pixel at the input's size.

    Resized by interpolation, which the head does with what this returns, the pixel's gradient is a
    sum over all pixels: PyTorch's kernel adds in bf16, one by one, and is off by 9% at 64 x 64.
    That of an expanded tensor is added in fp32, and a tensor of the right size is not resized.

    Shape:
        (N, C, H, W) -> (N, D, 1, 1), or on a GPU (N, D, H, W).
    """

    def forward(self, image: Tensor) -> Tensor:
        """Pool."""
        pooled = super().forward(image)
        return pooled.expand(-1, -1, *image.shape[2:]) if image.is_cuda else pooled
