"""MixUp with two class-index targets per image instead of a dense target."""

from __future__ import annotations

import numpy as np
import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from segmentation.losses import MixedTarget


class MixUp(Algorithm):
    """An algorithm that blends each image of a micro-batch with another image.

    See Zhang et al. 2018, https://arxiv.org/abs/1710.09412. The images and the random numbers are
    the same as in Composer's MixUp. However, the target is a `losses.MixedTarget` with two
    class-index targets and the mixing coefficient, whereas Composer creates three dense (N, C, H,
    W) tensors.

    Args:
        alpha: Parameter of the Beta distribution. The weight of the other image is min(z, 1 - z),
            where z is drawn from Beta(alpha, alpha). If `alpha` is 0, images are not mixed.

    Raises:
        ValueError: `alpha` is negative.
    """

    def __init__(self, alpha: float = 0.2):
        if alpha < 0:
            raise ValueError(f"alpha: {alpha} is negative; MixUp needs alpha >= 0")
        self.alpha = alpha

    def match(self, event: Event, state: State) -> bool:
        """Return whether a training forward pass is about to begin."""
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the micro-batch with mixed images and targets."""
        image, target = state.batch
        z = np.random.beta(self.alpha, self.alpha) if self.alpha else 0.0
        mixing = float(min(z, 1 - z))
        other = torch.randperm(len(image))
        # Pin the memory first, because a copy from unpinned memory would make the CPU wait.
        if image.is_cuda:
            other = other.pin_memory().to(image.device, non_blocking=True)
        mixed = torch.lerp(image, image[other], mixing)
        state.batch = (mixed, MixedTarget(target, target[other], mixing))
