"""DeepLabV3+ with mmsegmentation's head and a backbone such as torchvision's ResNet.

Architecture: Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation" (https://arxiv.org/abs/1802.02611), at output stride 8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, cast
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from errors import ModelError, WeightsError
from files import is_remote
from networks.base import IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
from networks.batch_norm import share_in_node
from networks.depthwise import replace_dilated
from networks.mmseg_operators import import_mmseg

# Maps the number of blocks in each of the four stages to the depth of a ResNet (He et al. 2016,
# table 1).
DEPTHS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "50",
    (3, 4, 23, 3): "101",
    (3, 8, 36, 3): "152",
}
# torchvision's name for a ResNet, ResNeXt or Wide ResNet, by the number of output channels and the
# number of channels per group of its first 3x3 convolution.
FAMILIES: dict[tuple[int, ...], str] = {
    (64, 64): "resnet{}",
    (128, 4): "resnext{}_32x4d",
    (256, 8): "resnext{}_32x8d",
    (256, 4): "resnext{}_64x4d",
    (128, 128): "wide_resnet{}_2",
}

_heads = import_mmseg()
ASPPHead, DepthwiseSeparableASPPHead = _heads.ASPPHead, _heads.DepthwiseSeparableASPPHead


class DeepLabV3(nn.Module):
    """A backbone with a decode head that computes class scores for each pixel.

    Args:
        backbone: Network that maps images to a dict or list of feature maps, finest first.
        classifier: Decode head that maps a tuple of feature maps to logits.
        upsample: Whether to resize the logits to the image's size. Training does not need this,
            because the loss and the metrics resize the logits part by part.
        neck: Module between backbone and classifier that converts the feature maps, or None.

    Shape:
        image (N, 3, H, W) -> logits (N, C, H, W). Without `upsample`, the logits are (N, C, H / 4,
            W / 4) for DeepLabV3+ and (N, C, H / 8, W / 8) for DeepLabV3.
    """

    name = "deeplabv3"
    mean, std = IMAGENET_CHANNEL_MEAN, IMAGENET_CHANNEL_STD
    memory_format = torch.channels_last

    def __init__(
        self,
        backbone: nn.Module,
        classifier: nn.Module,
        upsample: bool = True,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.classifier = classifier
        self.upsample = upsample

    def forward(self, image: Tensor) -> Tensor:
        """Return the logits; see the class for their shape."""
        features = self.backbone(image)
        if self.neck is not None:
            features = self.neck(features)
        maps = features.values() if isinstance(features, dict) else features
        logits = self.classifier(tuple(maps))
        if self.upsample:
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        return logits


class ImagePool(nn.Sequential):
    """Global average pooling that expands its result to the input's size on a GPU.

    Without this class, the head would resize the pooled pixel by interpolation, and the gradient
    would then be a sum over all pixels. PyTorch's kernel computes this sum in bf16, with an error
    of 9% at 64 x 64. The gradient of an expanded tensor is summed in fp32 instead. The head does
    not resize a tensor that already has the right size.

    Shape:
        (N, C, H, W) -> (N, D, 1, 1), or on a GPU (N, D, H, W).
    """

    def forward(self, image: Tensor) -> Tensor:
        """Return the pooled images."""
        pooled = super().forward(image)
        return pooled.expand(-1, -1, *image.shape[2:]) if image.is_cuda else pooled


def weight_init(module: nn.Module) -> None:
    """Initialise weights as in He et al. 2015 and make BatchNorm the identity, like MosaicML."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def deeplabv3(
    num_classes: int,
    backbone_arch: str = "resnet101",
    backbone_weights: str | None = None,
    sync_bn: bool = True,
    use_plus: bool = True,
    init_fn: Callable[[nn.Module], None] | None = None,
    upsample: bool = True,
) -> DeepLabV3:
    """Build DeepLabV3 or DeepLabV3+ with output stride 8.

    Args:
        num_classes: Number of classes C.
        backbone_arch: Name of a torchvision ResNet with bottleneck blocks, such as `"resnet101"`.
        backbone_weights: Name of torchvision weights such as `"IMAGENET1K_V2"`, path or URL of a
            state dict with torchvision's parameter names, or None.
        sync_bn: Whether the ranks of a node share BatchNorm statistics.
        use_plus: Whether to build DeepLabV3+, which has a stride-4 decoder, instead of DeepLabV3.
        init_fn: Function that initialises a module, or None. The function is applied to every
            module, or only to the head's modules if the backbone has weights.
        upsample: See `DeepLabV3`.

    Raises:
        ModelError: The backbone is not a ResNet with bottleneck blocks, or its weights cannot be
            loaded.
    """
    backbone = _resnet(backbone_arch)
    if backbone_weights:
        _load_backbone_weights(backbone, backbone_arch, backbone_weights)
    features = IntermediateLayerGetter(backbone, {"layer1": "layer1", "layer4": "layer4"})
    classifier = head(num_classes, 256, backbone.inplanes, use_plus)
    network = DeepLabV3(features, classifier, upsample)
    if init_fn is not None:
        (network.classifier if backbone_weights else network).apply(init_fn)
    if sync_bn:
        share_in_node(network)
    return network


def head(num_classes: int, low_channels: int, channels: int, use_plus: bool = True) -> nn.Module:
    """Build the head of DeepLabV3 or DeepLabV3+, which takes stride-4 and last-layer features.

    Args:
        num_classes: Number of classes C.
        low_channels: Number of channels of the stride-4 features.
        channels: Number of channels of the last-layer features.
        use_plus: Whether to build DeepLabV3+ instead of DeepLabV3.
    """
    arguments: dict[str, Any] = dict(
        in_channels=channels,
        channels=512,
        dilations=(1, 12, 24, 36),
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type="BN", requires_grad=True),
        # This loss is never used. It only suppresses mmsegmentation's warning about its default
        # loss.
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
    )
    if use_plus:
        arguments |= dict(c1_in_channels=low_channels, c1_channels=48)
    classifier = (DepthwiseSeparableASPPHead if use_plus else ASPPHead)(**arguments)
    replace_dilated(classifier)
    classifier.image_pool = ImagePool(*cast(nn.Sequential, classifier.image_pool))
    return classifier


def _resnet(arch: str) -> torchvision.models.ResNet:
    """Return the torchvision ResNet with this name, dilated to output stride 8."""
    builder = getattr(torchvision.models.resnet, arch, None) if arch.islower() else None
    if builder is None or arch not in torchvision.models.list_models(torchvision.models):
        raise ModelError(
            f"backbone_arch={arch}: torchvision has no such ResNet; use, for example, resnet101"
        )
    try:
        return builder(weights=None, replace_stride_with_dilation=[False, True, True])
    except NotImplementedError as error:  # torchvision cannot dilate basic blocks.
        raise ModelError(
            f"backbone_arch={arch} has basic blocks, which cannot be dilated to output stride 8; "
            "use a ResNet with bottleneck blocks, such as resnet50"
        ) from error


def _load_backbone_weights(backbone: nn.Module, arch: str, weights: str) -> None:
    """Load a backbone's weights, given a torchvision name, a path or a URL."""
    url = weights
    where = f"backbone_weights={weights}"
    if "/" not in weights and not os.path.exists(weights):
        named = {entry.name: entry for entry in torchvision.models.get_model_weights(arch)}
        if weights not in named:
            raise ModelError(
                f"{where}: no file and no torchvision weights have this name; "
                f"for {arch}, use {' or '.join(named)}"
            )
        url = named[weights].url
    if is_remote(url):
        from composer.utils import dist  # predict.py starts faster without Composer.

        target = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        try:
            # One rank per node downloads the file, and the node's other ranks read it from the
            # cache.
            first = dist.run_local_rank_zero_first() if dist.is_initialized() else nullcontext()
            with first:
                state = torch.hub.load_state_dict_from_url(
                    url, map_location="cpu", check_hash=url != weights, weights_only=True
                )
        except (URLError, OSError) as error:
            raise ModelError(
                f"{where}: cannot download {url} ({error}); download the file on another "
                f"machine and copy it to {target}"
            ) from error
    else:
        if not os.path.isfile(weights):
            raise ModelError(f"{where}: this file does not exist; check the path")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        # torch raises many types of errors for a file that is not a state dict.
        except Exception as error:
            raise ModelError(
                f"{where}: the file cannot be read as a PyTorch state dict "
                f"({type(error).__name__}); use a different file"
            ) from error
    _load_state(backbone, state, where, arch)


def _load_state(backbone: nn.Module, state: Any, where: str, arch: str) -> None:
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    expected = backbone.state_dict()
    needed = [key for key in expected if not key.startswith("fc.")]
    wrong = [key for key in needed if key not in state or state[key].shape != expected[key].shape]
    if wrong:
        raise ModelError(
            f"{where} does not match {arch}: {len(wrong)} of {len(needed)} tensors are missing or "
            f"have a different shape (the first is {wrong[0]}); use weights for {arch}"
        )
    backbone.load_state_dict({key: state[key] for key in needed}, strict=False)


def infer_architecture(state: Mapping[str, Tensor], where: str = "these weights") -> dict[str, Any]:
    """Return the arguments that `deeplabv3` needs to build a network that fits these weights.

    Args:
        state: Tensors by name, as in `checkpointing.weights.Weights.state`.
        where: Name of the weights, for error messages.

    Returns:
        The arguments `num_classes`, `backbone_arch` and `use_plus`.

    Raises:
        WeightsError: The weights do not belong to this project's DeepLabV3.
    """
    block = re.compile(r"backbone\.layer(\d)\.(\d+)\.conv3\.weight")
    found = [match.groups() for match in map(block.fullmatch, state) if match]
    blocks = tuple(sum(layer == str(i) for layer, _ in found) for i in (1, 2, 3, 4))
    scores = state.get("classifier.conv_seg.weight")
    conv2 = state.get("backbone.layer1.0.conv2.weight")
    if scores is None or conv2 is None or blocks not in DEPTHS or conv2.shape[:2] not in FAMILIES:
        raise WeightsError(
            f"{where}: the weights do not belong to a DeepLabV3 from this project (they have "
            f"{blocks} bottleneck blocks and {'a' if scores is not None else 'no'} "
            "classifier.conv_seg.weight); give the right network with --network"
        )
    return {
        "num_classes": scores.shape[0],
        "backbone_arch": FAMILIES[tuple(conv2.shape[:2])].format(DEPTHS[blocks]),
        "use_plus": "classifier.c1_bottleneck.conv.weight" in state,
    }


def create_network(
    name: str = "deeplabv3", arguments: Mapping[str, Any] | None = None, **keys: Any
) -> nn.Module:
    """Build a run's network from the config's `model` section.

    The logits are not upsampled to the image's size, but keep the network's own stride.

    Args:
        name: `"deeplabv3"`, or a name for `named_network`.
        arguments: Arguments of a network other than `deeplabv3`.
        **keys: Arguments of `deeplabv3`. Other networks use only `num_classes`, `sync_bn` and
            `backbone_weights`. If `backbone_weights` is not None, the network starts from its
            library's pretrained weights.

    Raises:
        ModelError: The network cannot be built.
    """
    if name == "deeplabv3":
        if arguments:
            raise ModelError(
                "model.arguments: deeplabv3 does not use this key; set its own keys directly under "
                "model"
            )
        return deeplabv3(**keys, upsample=False)
    from networks.registry import named_network

    pretrained = keys.get("backbone_weights")
    network = named_network(name, keys["num_classes"], arguments or {}, pretrained)
    if keys.get("sync_bn", True):
        share_in_node(network)
    return network


def create_meta_network(name: str, arguments: Mapping[str, Any] | None, **model: Any) -> nn.Module:
    """Build a network on the device "meta" to get the shapes of its tensors.

    Args:
        name: See `create_network`.
        arguments: Arguments of a network other than `deeplabv3`.
        **model: Other keys of the `model` section. Only some of these keys affect shapes.
    """
    keys = {key: model[key] for key in ("num_classes", "backbone_arch", "use_plus")}
    # Build networks from other libraries on the CPU: their constructors read tensor values, and
    # meta tensors have no values.
    with torch.device("meta" if name == "deeplabv3" else "cpu"):
        network = create_network(name, arguments, sync_bn=False, **keys).to("meta")
    return network.to(memory_format=network.memory_format)  # pyrefly: ignore[no-matching-overload]
