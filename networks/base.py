"""What the project asks of a network, and a network of another library made to give it.

Photos go in as (N, 3, H, W), normalised; logits (N, C, h, w) of any h and w come out, as a tensor,
as `.logits` or as `{"out": ...}`. Besides, a network says by which `mean` and `std` it wants photos
normalised, and of what number their sides have to be a multiple.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from errors import ModelError, one_line
from segmentation.losses import MixedTarget, segmentation_loss

# Of RGB values from 0 to 255, as torchvision's weights want them.
IMAGENET_CHANNEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_CHANNEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# What libraries call the part of a network that is pretrained on ImageNet.
BACKBONES = ("backbone", "encoder")


class Network(nn.Module):
    """A network of another library, or of one's own, as the project takes it.

    Photos are padded, below and to the right, with 0, which normalised is the mean colour; where
    they had to be, the logits are brought to the photo's size.

    Args:
        network: What computes.
        name: What it was built as, as of the key `model.name`.
        arguments: With which it can be built again, from these alone; see
            `networks.registry.named_network`.
        mean: Of the normalisation, a number a channel, of values from 0 to 255.
        std: Likewise.
        size_divisor: What the photos' sides have to be multiples of.
        channels_last: Whether it computes on tensors laid out so. Some call `view` on what they
            expect to lie otherwise, which `check` finds out.

    Shape:
        image (N, 3, H, W) -> logits (N, C, h, w); in training, of a network with auxiliary outputs,
        a tuple of those logits and the outputs, for `auxiliary_loss`.
    """

    auxiliary_weight = 0.5  # torchvision's references'
    # Pad, and resize the logits, at every size. An exported graph has no branch for sizes that fit.
    always_pads = False
    # Translates a tensor's name in files of the library's older versions.
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
        """With which the network can be built again, from these alone."""
        own = dict(mean=list(self.mean), std=list(self.std))
        own |= dict(size_divisor=self.size_divisor, channels_last=self.channels_last)
        return {**self._arguments, **own}

    @property
    def memory_format(self) -> torch.memory_format:
        """How weights and photos should lie in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def forward(self, image: Tensor) -> Any:
        """Return logits; see the class for their shape."""
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
        """Return the logits and, in training, the auxiliary outputs of photos of fitting size."""
        found = self.network(image)
        if isinstance(found, Mapping) and isinstance(found.get("out"), Tensor):
            auxiliary = [found["aux"]] if self.training and "aux" in found else []
            return (found["out"], *auxiliary)
        found = getattr(found, "logits", found)
        if not isinstance(found, Tensor):
            raise ModelError(
                f"model.name={self.name} gives {type(found).__name__}; the logits should come as a "
                'tensor, as .logits or as {"out": ...}'
            )
        return (found,)

    def auxiliary_loss(
        self, outputs: Sequence[Any], target: Tensor | MixedTarget, ignore_index: int
    ) -> Tensor:
        """Return the weighted sum of what the auxiliary outputs lose on a target (N, H, W)."""
        if isinstance(target, MixedTarget):
            pairs = [(target.target, 1 - target.mixing), (target.permuted, target.mixing)]
        else:
            pairs = [(target, 1.0)]
        losses = []
        for indices, share in pairs:
            height, width = indices.shape[1:]
            sides = (0, -width % self.size_divisor, 0, -height % self.size_divisor)
            padded = F.pad(indices, sides, value=ignore_index)
            losses += [share * loss for loss in self.losses_of(outputs, padded, ignore_index)]
        return torch.stack(losses).sum()

    def losses_of(self, outputs: Sequence[Any], target: Tensor, ignore_index: int) -> list[Tensor]:
        """Return what each auxiliary output loses, weighted."""
        return [self.auxiliary_weight * cross_entropy(o, target, ignore_index) for o in outputs]

    def check(self, num_classes: int, sizes: Sequence[int]) -> None:
        """See that the network takes square photos of these sizes and gives logits.

        Raises:
            ModelError: It does not.
        """
        was_training = self.training
        self.eval().to(memory_format=self.memory_format)  # pyright: ignore[reportCallIssue]
        try:
            for size in sizes:
                self._try(num_classes, size)
        except RuntimeError as error:
            if not (self.channels_last and "view size" in str(error)):
                raise self._failed(size, error) from error
            self.channels_last = False
            self.check(num_classes, sizes)
        except ModelError as error:
            if "model.name" in str(error):
                raise
            raise self._failed(size, error) from error
        except Exception as error:  # what any library's network may raise
            raise self._failed(size, error) from error
        finally:
            self.train(was_training)

    def _failed(self, size: int, error: Exception) -> ModelError:
        return ModelError(
            f"model.name={self.name} fails on photos of {size} x {size} pixels: {one_line(error)}"
        )

    def _try(self, num_classes: int, size: int) -> None:
        """Let two photos through."""
        image = torch.zeros(2, 3, size, size, device=next(self.parameters()).device)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = self(image.contiguous(memory_format=torch.channels_last))
        if logits.ndim != 4 or logits.shape[:2] != (2, num_classes):
            raise ModelError(
                f"model.name={self.name} gives {tuple(logits.shape)} for two photos, not "
                f"logits (2, {num_classes}, h, w)"
            )


def _top_left(logits: Tensor, height: int, width: int) -> Tensor:
    if not torch.compiler.is_exporting():
        return logits[:, :, :height, :width]
    # A slice has torch.export guess, from the example's size, whether it is the whole.
    rows, columns = (torch.arange(n, device=logits.device) for n in (height, width))
    return logits.index_select(2, rows).index_select(3, columns)


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the mean cross entropy of logits (N, C, h, w) over the target's pixels (N, H, W)."""
    losses = segmentation_loss(
        logits, target, ignore_index=ignore_index, cross_entropy_weight=1.0, dice_weight=0.0
    )
    return losses["total"]


def main_logits(outputs: Any) -> Tensor:
    """Return the logits of what a network gives in training, where auxiliary ones may follow."""
    return outputs[0] if isinstance(outputs, tuple) else outputs


def current_names(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a file under the names that the network's library has for them today."""
    rename = network.rename if isinstance(network, Network) else None
    return {rename(name) if rename else name: tensor for name, tensor in state.items()}


def inner(network: nn.Module) -> nn.Module:
    """Return a network under its library's own names of the tensors."""
    return network.network if isinstance(network, Network) else network


def backbone_of(network: nn.Module) -> nn.Module | None:
    """Return the part that is pretrained on ImageNet, or None where none is known."""
    network = inner(network)
    names = (*BACKBONES, getattr(network, "base_model_prefix", ""))
    found = (getattr(network, name, None) for name in names if name)
    return next((part for part in found if isinstance(part, nn.Module)), None)
