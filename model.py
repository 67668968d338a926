"""The network, DeepLabV3+ or another, and the ComposerModel that trains it.

    network = deeplabv3(num_classes=150, backbone_arch="resnet101")  # a plain nn.Module
    model = build_composer_deeplabv3(num_classes=150)  # what Composer's Trainer takes

Architecture: Chen et al. 2018, "Encoder-Decoder with Atrous Separable Convolution for Semantic
Image Segmentation" (https://arxiv.org/abs/1802.02611), at output stride 8.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from checkpointing.weights import Weights
from errors import ModelError, WeightsError
from networks.base import Network, current_names, inner, main_logits
from networks.batch_norm import count_batches, share_in_node, stop_counting
from networks.deeplab import DeepLabV3, deeplabv3, infer_architecture
from networks.deeplab import weight_init as weight_init  # part of the public interface
from segmentation.losses import fused_kernels, segmentation_loss
from segmentation.metrics import BatchScore, CrossEntropy, MIoU, score_batch

PROBED = 251  # a number of classes that no other layer has channels


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
        fused_loss: bool | str = "auto",
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
        self.cpu_autocast: torch.dtype | None = None
        self.eval_batch_size: int | None = None
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
    network = deeplabv3(num_classes, backbone_arch, backbone_weights, sync_bn, use_plus, init_fn)
    network.upsample = upsample
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
    name: str = "deeplabv3",
    arguments: Mapping[str, Any] | None = None,
    *,
    num_classes: int,
    backbone_arch: str = "resnet101",
    backbone_weights: str | None = None,
    sync_bn: bool = True,
    use_plus: bool = True,
    init_fn: Callable[[nn.Module], None] | None = None,
    **loss: Any,
) -> ComposerDeepLabV3:
    """Build what a run trains, by the keys below `model`; its logits have the network's stride.

    Args:
        name: See `named_network`; `"deeplabv3"` is `deeplabv3`, whose arguments the others are.
        arguments: Of a network that is not `deeplabv3`.
        num_classes: Number of classes C.
        backbone_arch: Of `deeplabv3`.
        backbone_weights: Of `deeplabv3`; of others, whether they begin with their library's.
        sync_bn: Whether BatchNorm statistics are shared by the processes of a node.
        use_plus: Of `deeplabv3`.
        init_fn: Of `deeplabv3`; other networks are initialised as their library does.
        **loss: See `ComposerDeepLabV3`.

    Raises:
        ModelError: The network cannot be built.
    """
    network: nn.Module
    if name == "deeplabv3":
        if arguments:
            raise ModelError("model.arguments: deeplabv3 has keys of its own, beside this one")
        network = deeplabv3(
            num_classes, backbone_arch, backbone_weights, sync_bn, use_plus, init_fn
        )
        network.upsample = False
    else:
        from networks.registry import named_network

        network = named_network(name, num_classes, arguments or {}, backbone_weights)
        if sync_bn:
            share_in_node(network)
    return ComposerDeepLabV3(network, num_classes, **loss)


def complete(weights: Weights, where: str, network: str | None) -> Weights:
    """Return another project's weights with the network and the number of classes that they are of.

    The network is built with a number of classes that no layer has otherwise. The tensors of that
    many rows are those with a row a class, and the file's tell how many classes there are.

    Args:
        weights: What `load_weights` gave. With a config, or without `network`, they are complete.
        where: What to call them in an error.
        network: What the user says that it is.

    Raises:
        WeightsError: They are not of this network, or its layers differ in their number of classes.
        ModelError: The network cannot be built.
    """
    if weights.config is not None or network in (None, "deeplabv3"):
        return weights
    from networks.libraries import foreign_arguments
    from networks.registry import named_network

    arguments, name = foreign_arguments(network, weights.beside, weights.state, where)
    built = named_network(name, PROBED, arguments)
    own, state = inner(built).state_dict(), _named_as(weights.state, inner(built))
    counts = {
        len(state[key])
        for key, tensor in own.items()
        if tensor.ndim and len(tensor) == PROBED and key in state and state[key].ndim
        if state[key].shape[1:] == tensor.shape[1:]
    }
    if len(counts) != 1:
        found = (
            f"has layers of {sorted(counts)} classes" if counts else "has no layer of its classes"
        )
        raise WeightsError(f"{where}: {found}, as {network} would; --network names another")
    model = {"name": network, "arguments": built.arguments, "num_classes": counts.pop()}
    return replace(weights, config={"model": model})


def _named_as(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return tensors without the beginning that all their names share and the network's do not."""
    own, state = network.state_dict(), dict(state)
    while state and not own.keys() & state.keys():
        first = {name.partition(".")[0] for name in state}
        if len(first) > 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return state


def build_network(
    weights: Weights, where: str = "these weights", network: str | None = None
) -> DeepLabV3 | Network:
    """Build a network in evaluation mode with these weights; its logits have its own stride.

    Args:
        weights: What `load_weights` gave.
        where: What to call them in an error.
        network: What the user says that it is: a function of one's own is called only then.

    Raises:
        WeightsError: They do not fit.
        ModelError: They name a network that cannot be built, or may not.
    """
    weights = complete(weights, where, network)
    name, arguments = weights.network
    built: DeepLabV3 | Network
    if network not in (None, name) and weights.config is not None:
        raise WeightsError(f"{where}: its network is {name}, not {network}")
    if (network or name) == "deeplabv3":
        built = deeplabv3(**infer_architecture(weights.state, where), sync_bn=False)
        built.upsample = False
    else:
        from networks.registry import named_network

        is_said = weights.config is not None
        built = named_network(
            network or name, weights.num_classes, arguments, None, is_said, network
        )
    try:
        inner(built).load_state_dict(_named_as(current_names(built, weights.state), inner(built)))
    except RuntimeError as error:
        problem = " ".join(str(error).split("\n\t")[1].split())
        raise WeightsError(f"{where}: {problem}") from error
    return built.eval()
