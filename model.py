"""DeepLabV3+ (a torchvision ResNet and mmsegmentation's head) and the ComposerModel that trains it.

    network = deeplabv3(num_classes=150, backbone_arch="resnet101")  # a plain nn.Module
    model = build_composer_deeplabv3(num_classes=150)  # what Composer's Trainer takes

Architecture: Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation" (https://arxiv.org/abs/1802.02611), at output stride 8.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision
from composer.models import ComposerClassifier
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torchmetrics import Metric, MetricCollection
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.resnet import Bottleneck

from checkpointing.weights import Weights, infer_architecture
from errors import ModelError, WeightsError
from segmentation.batch_norm import count_batches, share_statistics, stop_counting
from segmentation.depthwise import DilatedDepthwiseConv2d
from segmentation.losses import segmentation_loss
from segmentation.metrics import BatchScore, CrossEntropy, MIoU, score_batch
from segmentation.pooling import ImagePool


def _import_mmseg_heads() -> tuple[type[nn.Module], type[nn.Module]]:
    """Import mmsegmentation's heads, and take back what mmcv does to torch.

    mmcv announces its version 2.0 at every import. It also sets a function `_check_balance` in all
    modules named torch*: torch.ops lists it among its namespaces of operators, and torch.compile
    fails at the first that is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        from mmseg.models import ASPPHead, DepthwiseSeparableASPPHead
    if "_check_balance" in torch.ops._dir:
        torch.ops._dir.remove("_check_balance")
        delattr(torch.ops, "_check_balance")
    return ASPPHead, DepthwiseSeparableASPPHead


ASPPHead, DepthwiseSeparableASPPHead = _import_mmseg_heads()

log = logging.getLogger(__name__)


class DeepLabV3(nn.Module):
    """A backbone whose features a decode head turns into per-pixel class scores.

    Args:
        backbone: Maps an image to a dict of feature maps, finest first.
        classifier: Maps the tuple of those feature maps to logits.
        upsample: Whether to bring the logits to the size of the image. The loss and the metrics do
            that themselves, a part of the batch at a time, so training leaves it out.

    Shape:
        image (N, 3, H, W) -> logits (N, C, H, W), or (N, C, H / 4, W / 4) without `upsample`
        (H / 8 and W / 8 for DeepLabV3 without the plus).
    """

    def __init__(self, backbone: nn.Module, classifier: nn.Module, upsample: bool = True) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = classifier
        self.upsample = upsample

    def forward(self, image: Tensor) -> Tensor:
        """Return logits; see the class for their shape."""
        logits = self.classifier(tuple(self.backbone(image).values()))
        if self.upsample:
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
        return logits


def weight_init(module: nn.Module) -> None:
    """Initialise a layer as the reference does: He et al. 2015, and BatchNorm as identity."""
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
) -> DeepLabV3:
    """Build DeepLabV3(+) with output stride 8.

    Args:
        num_classes: Number of classes C.
        backbone_arch: A torchvision ResNet with bottleneck blocks, such as `"resnet101"`.
        backbone_weights: `None`, a torchvision name such as `"IMAGENET1K_V2"`, or the path or
            URL of a state dict with torchvision's parameter names.
        sync_bn: Whether BatchNorm statistics are shared by the processes of a node.
        use_plus: DeepLabV3+ (with the stride-4 decoder) rather than DeepLabV3.
        init_fn: Applied to every module; to those of the head alone where the backbone has weights.

    Raises:
        ModelError: The backbone is not such a ResNet, or the weights cannot be had or do not fit.
    """
    backbone = _resnet(backbone_arch)
    if backbone_weights:
        _load_backbone_weights(backbone, backbone_arch, backbone_weights)
    features = IntermediateLayerGetter(backbone, {"layer1": "layer1", "layer4": "layer4"})
    head_arguments = dict(
        in_channels=backbone.inplanes,
        in_index=-1,
        channels=512,
        dilations=(1, 12, 24, 36),
        dropout_ratio=0.1,
        num_classes=num_classes,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),  # unused; the default warns
    )
    if use_plus:
        head = DepthwiseSeparableASPPHead(c1_in_channels=256, c1_channels=48, **head_arguments)
        for branch in list(cast(Iterable[Any], head.aspp_modules))[1:]:
            conv = branch.depthwise_conv.conv
            # Without a draw of random numbers, which those after it would feel
            ours = skip_init(DilatedDepthwiseConv2d, conv.in_channels, conv.dilation[0])
            ours.weight = conv.weight
            branch.depthwise_conv.conv = ours
    else:
        head = ASPPHead(**head_arguments)
    head.image_pool = ImagePool(*cast(nn.Sequential, head.image_pool))
    network = DeepLabV3(features, head)
    if init_fn is not None:
        (network.classifier if backbone_weights else network).apply(init_fn)
    if sync_bn:
        _share_statistics(network)
    return network


def _resnet(arch: str) -> torchvision.models.ResNet:
    """Return a torchvision ResNet of this name, dilated to output stride 8."""
    builder = getattr(torchvision.models.resnet, arch, None) if arch.islower() else None
    if builder is None or arch not in torchvision.models.list_models(torchvision.models):
        raise ModelError(f"backbone_arch={arch}: torchvision has no such ResNet; try resnet101")
    try:
        backbone = builder(weights=None, replace_stride_with_dilation=[False, True, True])
    except NotImplementedError:  # what torchvision raises where basic blocks meet a dilation
        backbone = None
    if backbone is None or not isinstance(backbone.layer1[0], Bottleneck):
        raise ModelError(
            f"backbone_arch={arch} has basic blocks, which cannot be dilated to output stride 8; "
            "use a ResNet with bottleneck blocks, such as resnet50"
        )
    return backbone


def _load_backbone_weights(backbone: nn.Module, arch: str, weights: str) -> None:
    """Load ImageNet weights by torchvision's name, or a state dict from a path or URL, in place."""
    url = weights
    if "/" not in weights and not os.path.exists(weights):
        named = {entry.name: entry for entry in torchvision.models.get_model_weights(arch)}
        if weights not in named:
            raise ModelError(
                f"backbone_weights={weights}: {arch} has {', '.join(named)}, "
                "and there is no file of that name"
            )
        url = named[weights].url
    if "://" in url:
        target = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        try:
            # One process a node downloads; the others find the file in the cache.
            with (
                dist.run_local_rank_zero_first()
                if dist.is_initialized()
                else contextlib.nullcontext()
            ):
                state = torch.hub.load_state_dict_from_url(
                    url, map_location="cpu", check_hash=url != weights, weights_only=True
                )
        except (URLError, OSError) as error:
            raise ModelError(
                f"backbone_weights={weights}: cannot download {url} ({error}); "
                f"fetch that file elsewhere and put it at {target}"
            ) from error
    else:
        if not os.path.isfile(weights):
            raise ModelError(f"backbone_weights={weights}: no such file")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a file that is not a state dict
            raise ModelError(
                f"backbone_weights={weights}: not a PyTorch state dict ({type(error).__name__})"
            ) from error
    _load_state(backbone, state, f"backbone_weights={weights}", arch)


def _load_state(backbone: nn.Module, state: Any, what: str, arch: str) -> None:
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {key.removeprefix("module."): value for key, value in state.items()}
    expected = backbone.state_dict()
    needed = [key for key in expected if not key.startswith("fc.")]
    wrong = [key for key in needed if key not in state or state[key].shape != expected[key].shape]
    if wrong:
        raise ModelError(
            f"{what} does not fit {arch}: {len(wrong)} of {len(needed)} tensors are missing or of "
            f"another shape, first {wrong[0]}"
        )
    backbone.load_state_dict({key: state[key] for key in needed}, strict=False)


def _share_statistics(network: DeepLabV3) -> None:
    """Share BatchNorm statistics within each node (across nodes costs more than it gives)."""
    per_node = dist.get_local_world_size()
    if per_node == 1:
        return
    groups = [
        torch.distributed.new_group(list(range(start, start + per_node)))
        for start in range(0, dist.get_world_size(), per_node)
    ]
    # Each process is a member of its own node's group; torch's type is that of all others too.
    share_statistics(network, cast(torch.distributed.ProcessGroup, groups[dist.get_node_rank()]))


class ComposerDeepLabV3(ComposerClassifier):
    """What Composer's Trainer asks of a model, on `(image, target)` batches.

    Composer would score every training step; `callbacks.TrainMIoU` does it now and then.

    Args:
        network: Maps an image (N, 3, H, W) to logits of any resolution; kept as `module`.
        num_classes: Number of classes C.
        ignore_index: The target value of pixels that count in neither loss nor metrics.
        cross_entropy_weight: Weight of the cross entropy in the loss.
        dice_weight: Weight of the Dice loss in the loss.
        class_weights: Weights of the classes in both; None: all the same.

    Attributes:
        cpu_autocast: Where set (to `torch.bfloat16`), the forward pass on a CPU runs in that
            type; Composer has mixed precision for GPUs only.
        eval_batch_size: If set, pad the last evaluation batch to this many images, so that a
            compiled model sees one shape.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ignore_index: int = -1,
        cross_entropy_weight: float = 1.0,
        dice_weight: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        metrics = {
            "MIoU": MIoU(num_classes, ignore_index),
            "CrossEntropy": CrossEntropy(ignore_index),
        }
        super().__init__(network, num_classes, MetricCollection([]), MetricCollection(metrics))
        self.num_classes: int = num_classes
        self.ignore_index = ignore_index
        self.cross_entropy_weight = cross_entropy_weight
        self.dice_weight = dice_weight
        # No buffer: it is no part of what a checkpoint or an average holds.
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.cpu_autocast: torch.dtype | None = None
        self.eval_batch_size: int | None = None
        self._layers = stop_counting(network)  # that `forward` counts the batches of
        self._scored: tuple[weakref.ref[Tensor], BatchScore] | None = None

    def forward(self, batch: tuple[Tensor, Any]) -> Tensor:
        """Return the logits of a batch."""
        image = batch[0]
        count_batches(self._layers)
        if self.cpu_autocast is not None and image.device.type == "cpu":
            with torch.autocast("cpu", dtype=self.cpu_autocast):
                return self.module(image)
        return self.module(image)

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """Return `total` and its parts; see `segmentation.losses.segmentation_loss`."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(outputs.device)  # once
        return segmentation_loss(
            outputs,
            batch[1],
            ignore_index=self.ignore_index,
            cross_entropy_weight=self.cross_entropy_weight,
            dice_weight=self.dice_weight,
            class_weights=self.class_weights,
        )

    def eval_forward(self, batch: tuple[Tensor, Any], outputs: Tensor | None = None) -> Tensor:
        """Return the logits of a batch, which is padded to `eval_batch_size`."""
        if outputs is not None:
            return outputs
        image, target = batch
        missing = (self.eval_batch_size or 0) - len(image)
        if missing <= 0:
            return self.forward(batch)
        padded = F.pad(image, (0, 0) * 3 + (0, missing))
        padded = padded.contiguous(memory_format=torch.channels_last)
        return self.forward((padded, target))[: len(image)]

    def update_metric(self, batch: tuple[Tensor, Any], outputs: Tensor, metric: Metric) -> None:
        """Count a batch of an evaluation in a metric; all metrics share one upsampling."""
        if self._scored is None or self._scored[0]() is not outputs:
            score = score_batch(outputs, batch[1], self.num_classes, self.ignore_index)
            self._scored = weakref.ref(outputs), score
        metric.update(self._scored[1])


def build_composer_deeplabv3(
    num_classes: int,
    backbone_arch: str = "resnet101",
    backbone_weights: str | None = None,
    sync_bn: bool = True,
    use_plus: bool = True,
    ignore_index: int = -1,
    cross_entropy_weight: float = 1.0,
    dice_weight: float = 0.0,
    init_fn: Callable[[nn.Module], None] | None = None,
    *,
    upsample: bool = True,
    class_weights: Sequence[float] | None = None,
) -> ComposerDeepLabV3:
    """Build DeepLabV3(+) as a ComposerModel; see `deeplabv3` and `ComposerDeepLabV3`.

    Its arguments are theirs, but for `upsample`: whether `forward` returns logits of the image's
    size, as the reference does, rather than the decoder's.
    """
    network = deeplabv3(num_classes, backbone_arch, backbone_weights, sync_bn, use_plus, init_fn)
    network.upsample = upsample
    return ComposerDeepLabV3(
        network, num_classes, ignore_index, cross_entropy_weight, dice_weight, class_weights
    )


def build_network(weights: Weights, where: str = "these weights") -> DeepLabV3:
    """Build a network in evaluation mode with these weights; its logits have the decoder's stride.

    Args:
        weights: What `load_weights` gave.
        where: What to call them in an error.

    Raises:
        WeightsError: They do not fit.
    """
    network = deeplabv3(**infer_architecture(weights.state, where), sync_bn=False)
    try:
        network.load_state_dict(weights.state)
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n\t")[1].split())
        raise WeightsError(f"{where}: {problem}") from error
    network.upsample = False
    return network.eval()
