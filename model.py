"""The ComposerModel for training DeepLabV3+ or any other segmentation network.

    network = deeplabv3(num_classes=150, backbone_arch="resnet101")  # a plain nn.Module
    model = build_composer_deeplabv3(num_classes=150)  # a ComposerModel, for Composer's Trainer

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
from networks.deeplab import DeepLabV3 as DeepLabV3  # Part of this module's public API.
from networks.deeplab import create_network, deeplabv3
from networks.deeplab import weight_init as weight_init  # Part of this module's public API.
from segmentation.losses import fused_kernels, segmentation_loss
from segmentation.metrics import BatchScore, CrossEntropy, MIoU, score_batch


class ComposerDeepLabV3(ComposerClassifier):
    """A segmentation network with its loss and metrics, for use with Composer's Trainer.

    Batches are `(image, target)` pairs. The model has no training metrics, because Composer would
    compute them at every step. Instead, the callback `TrainMIoU` scores some of the steps.

    Args:
        network: Network that maps images (N, 3, H, W) to logits of any resolution; stored as
            `module`.
        num_classes: Number of classes C.
        ignore_index: Target value of pixels that the loss and the metrics ignore.
        cross_entropy_weight: Weight of the cross entropy in the loss.
        dice_weight: Weight of the Dice loss in the loss.
        class_weights: Weight of each class in the cross entropy and the Dice loss, or None for
            equal weights.
        fused_loss: `"auto"` to compute the loss with Triton kernels on a GPU, or `False` to compute
            it with PyTorch operations. Both methods give the same loss.
        cpu_autocast: Data type of the forward pass on a CPU, such as `torch.bfloat16`. Composer
            supports mixed precision only on GPUs.
        eval_batch_size: Size to which the last evaluation batch is padded, so that a compiled
            network sees only one shape. None disables the padding.
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
        # Like the loss, the metrics accept low-resolution logits, which avoids allocating a
        # full-size tensor (N, C, H, W).
        metrics = MetricCollection({"MIoU": MIoU(num_classes), "CrossEntropy": CrossEntropy()})
        # Leave out training metrics, because Composer would compute them at every step.
        super().__init__(network, num_classes, MetricCollection([]), metrics)
        self.num_classes: int = num_classes
        self.ignore_index = ignore_index
        self.cross_entropy_weight = cross_entropy_weight
        self.dice_weight = dice_weight
        self.fused_loss = fused_loss
        # Do not register the class weights as a buffer, because buffers are saved in checkpoints
        # and averaged by EMA.
        self.class_weights = None if class_weights is None else torch.tensor(class_weights)
        self.cpu_autocast = cpu_autocast
        self.eval_batch_size = eval_batch_size
        # Each of PyTorch's BatchNorm layers updates its own batch counter, which adds a hundred
        # tiny operations per step. Update all counters at once in forward() instead.
        self._layers = stop_counting(network)
        # Cache the score of the last batch, so that its logits are upsampled only once for both
        # metrics.
        self._scored: tuple[weakref.ref[Tensor], BatchScore] | None = None

    def forward(self, batch: tuple[Tensor, Any]) -> Any:
        """Return a batch's logits; during training, some networks also return auxiliary outputs."""
        image = batch[0]
        count_batches(self._layers)
        if self.cpu_autocast is not None and image.device.type == "cpu":
            with torch.autocast("cpu", dtype=self.cpu_autocast):
                return self.module(image)
        return self.module(image)

    def loss(self, outputs: Any, batch: tuple[Tensor, Any]) -> dict[str, Tensor]:
        """Return the total loss and its parts; see `segmentation.losses.segmentation_loss`."""
        # Composer moves only parameters and buffers to the device, so move the class weights here.
        # After the first call, this has no effect.
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(main_logits(outputs).device)
        # This context selects the kernels that compute the loss and its gradient.
        with fused_kernels(self.fused_loss is not False):
            losses = segmentation_loss(
                main_logits(outputs),
                batch[1],
                ignore_index=self.ignore_index,
                cross_entropy_weight=self.cross_entropy_weight,
                dice_weight=self.dice_weight,
                class_weights=self.class_weights,
            )
            # During training, a network from another library may return auxiliary outputs. Each of
            # these outputs has its own loss.
            if isinstance(outputs, tuple):
                network = cast(Network, self.module)
                auxiliary = network.auxiliary_loss(outputs[1:], batch[1], self.ignore_index)
                losses |= {"auxiliary": auxiliary, "total": losses["total"] + auxiliary}
        return losses

    def eval_forward(self, batch: tuple[Tensor, Any], outputs: Tensor | None = None) -> Tensor:
        """Return a batch's logits; a batch of fewer than `eval_batch_size` images is padded."""
        # If Composer has already computed the outputs, it passes them here.
        if outputs is not None:
            return outputs
        image, target = batch
        missing = (self.eval_batch_size or 0) - len(image)
        if missing <= 0:
            return self.forward(batch)
        # Pad with all-zero images, and discard their logits afterwards. The padding does not affect
        # the other images, because BatchNorm uses its running statistics during evaluation.
        padded = F.pad(image, (0, 0) * 3 + (0, missing))
        # Use the same memory format as the other batches, because torch.compile would recompile for
        # a different format.
        padded = padded.contiguous(memory_format=torch.channels_last)
        return self.forward((padded, target))[: len(image)]

    def update_metric(self, batch: tuple[Tensor, Any], outputs: Tensor, metric: Metric) -> None:
        """Add an evaluation batch to a metric."""
        metric.update(self.score(outputs, batch[1]))

    def score(self, outputs: Tensor, target: Tensor) -> BatchScore:
        """Return the score of a batch's logits, which are upsampled only once for all metrics."""
        # Identify the logits by a weak reference, so that they are not kept in memory.
        if self._scored is None or self._scored[0]() is not outputs:
            score = score_batch(outputs, target, self.ignore_index)
            self._scored = weakref.ref(outputs), score
        return self._scored[1]


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
    """Build DeepLabV3(+) as a ComposerModel.

    The function name and the argument order match MosaicML's code. Newer arguments are
    keyword-only. See `deeplabv3` and `ComposerDeepLabV3` for details.

    Args:
        num_classes: Number of classes C.
        backbone_arch: See `deeplabv3`.
        backbone_weights: See `deeplabv3`.
        sync_bn: See `deeplabv3`.
        use_plus: See `deeplabv3`.
        ignore_index: See `ComposerDeepLabV3`.
        cross_entropy_weight: See `ComposerDeepLabV3`.
        dice_weight: See `ComposerDeepLabV3`.
        init_fn: See `deeplabv3`.
        upsample: Whether `forward` returns logits at the image's resolution, as in MosaicML's code,
            instead of the decoder's resolution.
        class_weights: See `ComposerDeepLabV3`.
        fused_loss: See `ComposerDeepLabV3`.

    Raises:
        ModelError: The backbone cannot be built, or its weights cannot be loaded.
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
    """Build the ComposerModel of a run from the config's `model` section.

    Args:
        name: See `networks.deeplab.create_network`.
        arguments: See `create_network`.
        **keys: Arguments of `deeplabv3` and `ComposerDeepLabV3`.

    Raises:
        ModelError: The network cannot be built.
    """
    # Pass deeplabv3's arguments to create_network, and all other keys to ComposerDeepLabV3.
    names = keys.keys() & inspect.signature(deeplabv3).parameters.keys()
    of_network = {name: keys.pop(name) for name in names}
    network = create_network(name, arguments, **of_network)
    return ComposerDeepLabV3(network, of_network["num_classes"], **keys)
