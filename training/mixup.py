"""MixUp with pairs of index targets instead of dense targets."""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from segmentation.losses import MixedTarget


class MixUp(Algorithm):
    """An algorithm that blends each image of a micro-batch with another.

    See Zhang et al. 2018, https://arxiv.org/abs/1710.09412. Images and random numbers are those of
    Composer's MixUp. The target becomes a `losses.MixedTarget`: both index targets and the
    coefficient. Composer makes three dense (N, C, H, W) tensors instead.

    Args:
        alpha: Parameter of the distribution. The weight of the other image is min(z, 1 - z), with z
            drawn from Beta(alpha, alpha); 0 mixes nothing.

    Raises:
        ValueError: `alpha` is negative.
    """

    def __init__(self, alpha: float = 0.2):
        if alpha < 0:
            raise ValueError(f"MixUp needs alpha >= 0, not {alpha}")
        self.alpha = alpha

    def match(self, event: Event, state: State) -> bool:
        """Return whether a training forward pass is about to begin."""
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the micro-batch with the mixed one."""
        image, target = state.batch
        z = np.random.beta(self.alpha, self.alpha) if self.alpha else 0.0
        mixing = float(min(z, 1 - z))
        other = torch.randperm(len(image))
        if image.is_cuda:  # A copy from memory that is not pinned would make the host wait.
            other = other.pin_memory().to(image.device, non_blocking=True)
        mixed = torch.lerp(image, image[other], mixing)
        state.batch = (mixed, MixedTarget(target, target[other], mixing))
