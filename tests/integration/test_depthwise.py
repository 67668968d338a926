"""Compilation of the depthwise convolution of networks/depthwise.py."""

from __future__ import annotations

import torch
from torch.library import opcheck

from networks import depthwise
from networks.depthwise import DilatedDepthwiseConv2d

CHANNELS = 80  # one chunk of 64 channels and a remainder of 16


def layer(dilation: int) -> DilatedDepthwiseConv2d:
    torch.manual_seed(dilation)
    options = dict(padding=dilation, dilation=dilation, groups=CHANNELS, bias=False)
    conv = DilatedDepthwiseConv2d(CHANNELS, CHANNELS, 3, **options)
    return conv.to(memory_format=torch.channels_last)


def test_depthwise_convolution_compiles_without_graph_break():
    conv = layer(12)
    image = torch.randn(2, CHANNELS, 16, 16, requires_grad=True)
    opcheck(depthwise.convolution, (image, conv.weight, 12))
    compiled = torch.compile(conv, backend="aot_eager", fullgraph=True)
    (actual,) = torch.autograd.grad(compiled(image).sum(), conv.weight)
    (expected,) = torch.autograd.grad(conv(image).sum(), conv.weight)
    torch.testing.assert_close(actual, expected)
