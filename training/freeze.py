"""Weights that a step leaves out: a frozen backbone, and parts of some libraries' networks."""

from __future__ import annotations

from typing import cast

import torch
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from errors import ConfigError
from networks.base import backbone_of
from training.composer_internals import without_ddp


class UnusedWeights(Algorithm):
    """Lets passes leave out some weights, as those of some libraries' networks do.

    DistributedDataParallel waits for a gradient of each weight where it is not told.
    """

    @property
    def find_unused_parameters(self) -> bool:
        """Have the trainer tell DistributedDataParallel."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """Do nothing else."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do nothing."""


class FreezeBackbone(UnusedWeights):
    """Keeps the backbone as it is for the beginning of a run: weights and BatchNorm's statistics.

    What a step does follows from the run's time alone, so that a resumed run does the same.

    Args:
        duration: Time string.
    """

    def __init__(self, duration: str):
        self.duration = Time.from_timestring(duration)
        self.is_frozen = False

    def match(self, event: Event, state: State) -> bool:
        """Run before the trainer wraps the network, and when a batch begins."""
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Freeze the backbone, or let it go."""
        backbone = backbone_of(cast(nn.Module, without_ddp(state).module))
        if backbone is None:
            raise ConfigError("model.freeze_backbone: no part of this network is known as backbone")
        if event == Event.INIT:
            return
        is_frozen = state.timestamp.get(self.duration.unit) < self.duration
        if is_frozen:  # the trainer puts all of the network into training mode after an evaluation
            backbone.eval()
        elif self.is_frozen:
            backbone.train()
        if is_frozen != self.is_frozen:
            for optimizer in state.optimizers:
                _prepare_state(optimizer, list(backbone.parameters()))
            backbone.requires_grad_(not is_frozen)
            self.is_frozen = is_frozen


def _prepare_state(optimizer: Optimizer, weights: list[nn.Parameter]) -> None:
    """Have an optimizer keep a state, all 0, of weights that it has not stepped yet.

    That is what it begins with, and without any torch refuses to load its checkpoint.
    """
    weights = [weight for weight in weights if not optimizer.state.get(weight)]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # and so no weight decay
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    if weights:
        optimizer.step()
    for weight in weights:
        weight.grad = None
        for value in optimizer.state[weight].values():
            if isinstance(value, torch.Tensor):
                value.zero_()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
