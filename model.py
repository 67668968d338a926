"""The network, DeepLabV3+ or another, and the ComposerModel that trains it.

    network = deeplabv3(num_classes=150, backbone_arch="resnet101")  # a plain nn.Module
    model = build_composer_deeplabv3(num_classes=150)  # what Composer's Trainer takes

Architecture: Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation" (https://arxiv.org/abs/1802.02611), at output stride 8.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from networks.base import Network, main_logits
from networks.batch_norm import count_batches, stop_counting
from networks.deeplab import DeepLabV3, create_network, deeplabv3, weight_init
from segmentation.losses import fused_kernels, segmentation_loss
from segmentation.metrics import BatchScore, CrossEntropy, MIoU, score_batch

__all__ = [
    "ComposerDeepLabV3",
    "DeepLabV3",
    "build_composer_deeplabv3",
    "build_composer_model",
    "deeplabv3",
    "weight_init",
]


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
        fused_loss: `"auto"` computes the loss with Triton kernels on a GPU, `False` with PyTorch's
            operations; both are the same loss.
        cpu_autocast: Type of the forward pass on a CPU, such as `torch.bfloat16`. Composer has
            mixed precision for GPUs only.
        eval_batch_size: Pad the last evaluation batch to this many images, so that a compiled
            network sees one shape; None leaves it as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        ignore_index: int = -1,
        cross_entropy_weight: float = 1.0,
        dice_weight: float = 0.0,
        class_weights: Sequence[float] | None = None,
        fused_loss: bool | str = "auto",
        cpu_autocast: torch.dtype | None = None,
        eval_batch_size: int | None = None,
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
        self.fused_loss = fused_loss
        # No buffer: it is no part of what a checkpoint or an average holds.
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.cpu_autocast = cpu_autocast
        self.eval_batch_size = eval_batch_size
        self._layers = stop_counting(network)  # that `forward` counts the batches of
        self._scored: tuple[weakref.ref[Tensor], BatchScore] | None = None

    def forward(self, batch: tuple[Tensor, Any]) -> Any:
        """Return the logits of a batch; in training, with a network's auxiliary outputs after."""
        image = batch[0]
        count_batches(self._layers)
        if self.cpu_autocast is not None and image.device.type == "cpu":
            with torch.autocast("cpu", dtype=self.cpu_autocast):
                return self.module(image)
        return self.module(image)

    def loss(self, outputs: Any, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """Return `total` and its parts; see `segmentation.losses.segmentation_loss`."""
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(main_logits(outputs).device)  # once
        with fused_kernels(self.fused_loss is not False):
            losses = segmentation_loss(
                main_logits(outputs),
                batch[1],
                ignore_index=self.ignore_index,
                cross_entropy_weight=self.cross_entropy_weight,
                dice_weight=self.dice_weight,
                class_weights=self.class_weights,
            )
            if isinstance(outputs, tuple):
                network = cast(Network, self.module)
                auxiliary = network.auxiliary_loss(outputs[1:], batch[1], self.ignore_index)
                losses |= {"auxiliary": auxiliary, "total": losses["total"] + auxiliary}
        return losses

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
    fused_loss: bool | str = "auto",
) -> ComposerDeepLabV3:
    """Build DeepLabV3(+) as a ComposerModel; see `deeplabv3` and `ComposerDeepLabV3`.

    Its arguments are theirs, but for `upsample`: whether `forward` returns logits of the image's
    size, as the reference does, rather than the decoder's.
    """
    network = deeplabv3(
        num_classes, backbone_arch, backbone_weights, sync_bn, use_plus, init_fn, upsample
    )
    return ComposerDeepLabV3(
        network,
        num_classes,
        ignore_index,
        cross_entropy_weight,
        dice_weight,
        class_weights,
        fused_loss,
    )


def build_composer_model(
    name: str = "deeplabv3", arguments: Mapping[str, Any] | None = None, **keys: Any
) -> ComposerDeepLabV3:
    """Build the ComposerModel of a run, by the keys below `model`.

    Args:
        name: See `networks.deeplab.create_network`.
        arguments: See `create_network`.
        **keys: Other arguments of `create_network`, and of `ComposerDeepLabV3`.

    Raises:
        ModelError: The network cannot be built.
    """
    names = keys.keys() & inspect.signature(create_network).parameters.keys()
    of_network = {name: keys.pop(name) for name in names}
    network = create_network(name, arguments, **of_network)
    return ComposerDeepLabV3(network, of_network["num_classes"], **keys)
