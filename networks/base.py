"""The interface that this project expects of a network, and a wrapper for other networks.

A network takes normalised images (N, 3, H, W). It returns logits (N, C, h, w) of any resolution as
a tensor, as `.logits`, or as `{"out": ...}`. A network also defines the `mean` and `std` for
normalisation, and a number by which the sides of images must be divisible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ModelError, one_line
from segmentation.losses import MixedTarget, segmentation_loss, split_target

# Mean and standard deviation of each RGB channel for torchvision's weights, on the 0-255 scale.
IMAGENET_CHANNEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_CHANNEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# Names that libraries give to the part of a network that is pretrained on ImageNet.
BACKBONES = ("backbone", "encoder")


class Network(nn.Module):
    """A wrapper for a network from another library or for a user's own network.

    Images are padded at the bottom and on the right with 0, which is the mean colour after
    normalisation. The logits of padded images are resized to the padded size and then cropped.

    Args:
        network: The wrapped network.
        name: Name of the network, as in the key `model.name`.
        arguments: Arguments from which the network can be rebuilt; see
            `networks.registry.named_network`.
        mean: Mean of each channel for normalisation, on the 0-255 scale.
        std: Standard deviation of each channel for normalisation, on the 0-255 scale.
        size_divisor: Number by which the sides of the network's input must be divisible. Images are
            padded to a multiple of this number.
        channels_last: Whether weights and images are channels-last. `check` disables this if the
            network calls `view` on tensors that it expects to be contiguous.

    Shape:
        image (N, 3, H, W) -> logits (N, C, h, w). In training, a network with auxiliary outputs
            returns a tuple of the logits and the outputs for `auxiliary_loss`.
    """

    # torchvision's reference scripts use the same weight for auxiliary losses.
    auxiliary_weight = 0.5

    # Whether to pad and resize for every input size, even if no padding is needed. An exported
    # graph needs this, because it cannot branch on the size.
    always_pads = False
    # Function that converts a tensor name from an older version of the library to the current name,
    # or None.
    rename: Callable[[str], str] | None = None

    def __init__(
        self,
        network: nn.Module,
        name: str,
        arguments: Mapping[str, Any],
        mean: Sequence[float] = IMAGENET_CHANNEL_MEAN,
        std: Sequence[float] = IMAGENET_CHANNEL_STD,
        size_divisor: int = 1,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.network = network
        self.name = name
        self.mean = tuple(float(value) for value in arguments.get("mean", mean))
        self.std = tuple(float(value) for value in arguments.get("std", std))
        self.size_divisor = int(arguments.get("size_divisor", size_divisor))
        self.channels_last = bool(arguments.get("channels_last", channels_last))
        self._arguments = dict(arguments)

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments from which the network can be rebuilt."""
        own = dict(mean=list(self.mean), std=list(self.std))
        own |= dict(size_divisor=self.size_divisor, channels_last=self.channels_last)
        return {**self._arguments, **own}

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the weights and images."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def forward(self, image: Tensor) -> Any:
        """Return the logits; see the class for their shape."""
        height, width = image.shape[2:]
        bottom, right = -height % self.size_divisor, -width % self.size_divisor
        exported = torch.jit.is_tracing() or torch.compiler.is_exporting()
        always = exported or self.always_pads
        pads = self.size_divisor > 1 and (always or bottom > 0 or right > 0)
        if pads:
            image = F.pad(image, (0, right, 0, bottom))
        if not self.channels_last:
            image = image.contiguous()
        logits, *auxiliary = self.outputs(image)
        if pads:
            logits = F.interpolate(logits, image.shape[2:], mode="bilinear", align_corners=False)
            logits = _top_left(logits, height, width)
        return (logits, *auxiliary) if auxiliary else logits

    def outputs(self, image: Tensor) -> tuple[Any, ...]:
        """Return the logits of padded images and, in training, the auxiliary outputs."""
        found = self.network(image)
        if isinstance(found, Mapping) and isinstance(found.get("out"), Tensor):
            auxiliary = [found["aux"]] if self.training and "aux" in found else []
            return (found["out"], *auxiliary)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor):
            raise ModelError(
                f"model.name={self.name} returns {type(found).__name__}; it must return the "
                'logits as a tensor, in an attribute .logits or in a dict {"out": ...}'
            )
        return (found,)

    def auxiliary_loss(
        self, outputs: Sequence[Any], target: Tensor | MixedTarget, ignore_index: int
    ) -> Tensor:
        """Return the weighted sum of the auxiliary losses for a target (N, H, W)."""
        losses = []
        for indices, share in split_target(target):
            height, width = indices.shape[1:]
            sides = (0, -width % self.size_divisor, 0, -height % self.size_divisor)
            padded = F.pad(indices, sides, value=ignore_index)
            losses += [share * loss for loss in self.losses_of(outputs, padded, ignore_index)]
        return torch.stack(losses).sum()

    def losses_of(self, outputs: Sequence[Any], target: Tensor, ignore_index: int) -> list[Tensor]:
        """Return one weighted loss for each auxiliary output."""
        return [self.auxiliary_weight * cross_entropy(o, target, ignore_index) for o in outputs]

    def check(self, num_classes: int, sizes: Sequence[int]) -> None:
        """Check that the network returns logits for square images of these sizes.

        Args:
            num_classes: Number of classes C.
            sizes: Side lengths of the images, in pixels.

        Raises:
            ModelError: The network fails, or its output has the wrong shape.
        """
        was_training = self.training
        self.eval().to(memory_format=self.memory_format)  # pyrefly: ignore[no-matching-overload]
        try:
            for size in sizes:
                self._try(num_classes, size)
        except Exception as error:  # Networks from other libraries may raise any exception.
            if isinstance(error, ModelError) and "model.name" in str(error):
                raise
            is_view = isinstance(error, RuntimeError) and "view size" in str(error)
            if not (is_view and self.channels_last):
                raise ModelError(
                    f"model.name={self.name} fails on images of {size} x {size} pixels: "
                    f"{one_line(error)}"
                ) from error
            self.channels_last = False
            self.check(num_classes, sizes)
        finally:
            self.train(was_training)

    def _try(self, num_classes: int, size: int) -> None:
        """Run the network on two images and check the shape of its output."""
        image = torch.zeros(2, 3, size, size, device=next(self.parameters()).device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = self(image.contiguous(memory_format=torch.channels_last))
        if logits.ndim != 4 or logits.shape[:2] != (2, num_classes):
            raise ModelError(
                f"model.name={self.name} returns logits of shape {tuple(logits.shape)} for two "
                f"images; it must return the shape (2, {num_classes}, h, w)"
            )


def _top_left(logits: Tensor, height: int, width: int) -> Tensor:
    if not torch.compiler.is_exporting():
        return logits[:, :, :height, :width]
    # Use index_select, because torch.export would decide from the example input's size whether a
    # slice covers the whole tensor.
    rows, columns = (torch.arange(n, device=logits.device) for n in (height, width))
    return logits.index_select(2, rows).index_select(3, columns)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross entropy of logits (N, C, h, w) over a target's pixels (N, H, W)."""
    return segmentation_loss(logits, target, ignore_index=ignore_index)["cross_entropy"]


def main_logits(outputs: Any) -> Tensor:
    """Return the logits in a network's output, without any auxiliary outputs."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def current_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors under the names used by the library's current version."""
    rename = network.rename if isinstance(network, Network) else None
    return {rename(name) if rename else name: tensor for name, tensor in state.items()}


def inner(network: nn.Module) -> nn.Module:
    """Return the network without this project's wrapper `Network`."""
    return network.network if isinstance(network, Network) else network


def backbone_of(network: nn.Module) -> nn.Module | None:
    """Return the part of a network that is pretrained on ImageNet, or None if it is unknown."""
    network = inner(network)
    names = (*BACKBONES, str(getattr(network, "base_model_prefix", "")))
    found = (getattr(network, name, None) for name in names if name)
    return next((part for part in found if isinstance(part, nn.Module)), None)
