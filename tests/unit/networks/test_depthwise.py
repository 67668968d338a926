"""Tests of networks/depthwise.py."""

import pytest
import torch
import torch.nn.functional as F

from networks import depthwise
from networks.depthwise import DilatedDepthwiseConv2d

CHANNELS = 80  # one chunk of 64 channels and a remainder


def layer(dilation: int) -> DilatedDepthwiseConv2d:
    torch.manual_seed(dilation)
    options = dict(padding=dilation, dilation=dilation, groups=CHANNELS, bias=False)
    conv = DilatedDepthwiseConv2d(CHANNELS, CHANNELS, 3, **options)
    return conv.to(memory_format=torch.channels_last)


def reference(conv, image, grad):
    """Return the output and the gradients of `F.conv2d` in fp64."""
    image, weight = image.detach().double(), conv.weight.detach().double()
    image.requires_grad_()
    weight.requires_grad_()
    d = conv.dilation[0]
    output = F.conv2d(image, weight, padding=d, dilation=d, groups=len(weight))
    return output.detach(), *torch.autograd.grad(output, (image, weight), grad.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(
    ("dilation", "size"), [(12, (40, 30)), (12, (12, 13)), (36, (9, 50)), (36, (4, 4)), (1, (5, 3))]
)
def test_depthwise_convolution_matches_pytorch(monkeypatch, dilation, size, layout, dtype):
    monkeypatch.setattr(depthwise, "CHUNK", 1)
    conv = layer(dilation)
    image = torch.randn(2, CHANNELS, *size).to(dtype).contiguous(memory_format=layout)
    grad = torch.randn_like(image)
    image.requires_grad_()
    output = conv(image)
    results = (output, *torch.autograd.grad(output, (image, conv.weight), grad))
    assert output.dtype == dtype and output.stride() == image.stride()
    assert results[2].stride() == conv.weight.stride()
    for ours, exact in zip(results, reference(conv, image, grad), strict=True):
        tolerance = 1e-5 if ours.dtype == torch.float32 else 2**-8  # bf16 has 8 significant bits
        assert (ours - exact).abs().max() <= tolerance * exact.abs().max()


def test_bf16_weight_gradient_is_accurate_at_full_size():
    """The gradient that oneDNN computes would be too inaccurate to pass."""
    conv = layer(12)
    image = (
        torch.randn(1, CHANNELS, 64, 64).bfloat16().contiguous(memory_format=torch.channels_last)
    )
    grad = torch.randn_like(image)
    (actual,) = torch.autograd.grad(conv(image), conv.weight, grad)
    exact = reference(conv, image, grad)[2]
    assert (actual - exact).norm() < 1e-3 * exact.norm()


def test_depthwise_convolution_is_exported_as_a_standard_convolution():
    conv = layer(12).eval()
    image = torch.randn(1, CHANNELS, 16, 16)
    traced = torch.jit.trace(conv, image)
    assert "aten::_convolution" in str(traced.inlined_graph)
    exported = torch.export.export(conv, (image,))
    assert "conv2d" in str(exported.graph)
    for other in (traced, exported.module()):
        torch.testing.assert_close(other(image), conv(image), rtol=1e-4, atol=1e-5)
