"""A dilated depthwise 3 x 3 convolution for CPUs, computed as nine multiply-adds.

DeepLabV3+'s head has three such convolutions, with 2048 channels and dilations 12, 24 and 36. Many
of their inputs are padding. On x86, PyTorch computes them with oneDNN. With 128-pixel images, they
take a quarter of a training step's time but do only a ten-thousandth of its arithmetic. oneDNN's
bf16 weight gradient is also wrong when most inputs lie inside the image: it is off by 140% for 64 x
64 features and dilation 12 (torch 2.7.0 and 2.13.0).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Number of values to process at a time. In fp32 they take 512 KiB, which fits in the L2 cache of
# one core.
CHUNK = 2**17


class DilatedDepthwiseConv2d(nn.Conv2d):
    """A `nn.Conv2d` with a 3 x 3 kernel, stride 1, `groups=channels` and `padding=dilation`.

    On a GPU and in exported graphs, the layer calls PyTorch's own operator. To create such layers,
    call `replace_dilated`. It checks the properties above.

    Shape:
        (N, C, H, W) -> (N, C, H, W), of the same data type. Sums are computed in fp32.
    """

    def forward(self, image: Tensor) -> Tensor:
        """Convolve images; see the class for the shapes."""
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if image.is_cuda or exported or image.dtype == torch.float64:
            return super().forward(image)
        return convolution(image, self.weight, self.dilation[0])


def replace_dilated(module: nn.Module) -> None:
    """Convert a module's dilated depthwise 3 x 3 convolutions to `DilatedDepthwiseConv2d`."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_dilated_depthwise(layer):
            layer.__class__ = DilatedDepthwiseConv2d


def _is_dilated_depthwise(conv: nn.Conv2d) -> bool:
    """Return whether `DilatedDepthwiseConv2d` can compute the same result as a convolution."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation[0] == conv.dilation[1] > 1
        and conv.padding == conv.dilation
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is None
    )


@torch.library.custom_op("deeplab::dilated_depthwise", mutates_args=())
def convolution(image: Tensor, weight: Tensor, dilation: int) -> Tensor:
    """Convolve images (N, C, H, W) with a kernel (C, 1, 3, 3), padded by the dilation."""
    result = torch.empty_like(image)
    taps = list(_taps(image.shape, dilation))
    kernel = weight.float()[:, 0, :, :, None, None]
    for n, c in _chunks(image):
        part = _copy(image[n, c])
        total = part * kernel[c, 1, 1]
        for y, x, to, source in taps:
            total[to].addcmul_(part[source], kernel[c, y, x])
        result[n, c] = total
    return result


@torch.library.custom_op("deeplab::dilated_depthwise_backward", mutates_args=())
def gradients(grad: Tensor, image: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor]:
    """Return the gradients with respect to the images and the weight."""
    by_image = torch.empty_like(image)
    taps = list(_taps(image.shape, dilation))
    kernel = weight.float()[:, 0, :, :, None, None]
    by_kernel = torch.zeros(weight.shape, device=weight.device)[:, 0]
    for n, c in _chunks(image):
        part, grad_part = _copy(image[n, c]), _copy(grad[n, c])
        total = grad_part * kernel[c, 1, 1]
        by_kernel[c, 1, 1] += (grad_part * part).sum((1, 2))
        for y, x, to, source in taps:
            total[source].addcmul_(grad_part[to], kernel[c, y, x])
            by_kernel[c, y, x] += (grad_part[to] * part[source]).sum((1, 2))
        by_image[n, c] = total
    return by_image, torch.empty_like(weight).copy_(by_kernel[:, None])


def _copy(part: Tensor) -> Tensor:
    """Copy part of an image to a dense fp32 tensor."""
    return part.to(torch.float32, copy=True)


def _chunks(image: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the parts to process, each as the index of an image and a range of its channels."""
    count, channels, height, width = image.shape
    step = max(64, CHUNK // (height * width))
    for n in range(count):
        for first in range(0, channels, step):
            yield n, slice(first, first + step)


def _taps(
    shape: torch.Size, dilation: int
) -> Iterator[tuple[int, int, tuple[slice, ...], tuple[slice, ...]]]:
    """Yield each kernel position except the centre, with its output and input slices."""
    for y in range(3):
        for x in range(3):
            down, right = (y - 1) * dilation, (x - 1) * dilation
            if (y, x) == (1, 1) or abs(down) >= shape[2] or abs(right) >= shape[3]:
                continue
            rows, columns = _overlap(down, shape[2]), _overlap(right, shape[3])
            yield y, x, (slice(None), rows[0], columns[0]), (slice(None), rows[1], columns[1])


def _overlap(offset: int, size: int) -> tuple[slice, slice]:
    """Return two slices: the positions that have a neighbour at this offset, and the neighbours."""
    first, last = max(0, -offset), size - max(0, offset)
    return slice(first, last), slice(first + offset, last + offset)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    image, weight, ctx.dilation = inputs
    ctx.save_for_backward(image, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return *gradients(grad, *ctx.saved_tensors, ctx.dilation), None


convolution.register_fake(lambda image, weight, dilation: torch.empty_like(image))
gradients.register_fake(
    lambda grad, image, weight, dilation: (torch.empty_like(image), torch.empty_like(weight))
)
convolution.register_autograd(_backward, setup_context=_save)
