"""Algorithms for parameters that a training step does not use, such as a frozen backbone."""

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
    """An algorithm that lets a network have parameters that its forward pass does not use.

    Some libraries' networks have unused parameters, but by default, DistributedDataParallel waits
    for the gradient of every parameter.
    """

    @property
    def find_unused_parameters(self) -> bool:
        """Return True, so that the trainer sets the DDP option `find_unused_parameters`."""
        return True

    def match(self, event: Event, state: State) -> bool:
        """Return False, because the algorithm has nothing to do at any event."""
        return False

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do nothing."""


class FreezeBackbone(UnusedWeights):
    """An algorithm that freezes the backbone and its BatchNorm statistics at the start of training.

    Whether the backbone is frozen depends only on the training time, so a resumed run behaves the
    same.

    Args:
        duration: Time for which the backbone stays frozen, as a time string.
    """

    def __init__(self, duration: str):
        self.duration = Time.from_timestring(duration)
        self.is_frozen = False

    def match(self, event: Event, state: State) -> bool:
        """Return whether the trainer is about to wrap the network or start a batch."""
        return event in (Event.INIT, Event.BATCH_START)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Freeze or unfreeze the backbone, depending on the training time."""
        backbone = backbone_of(cast(nn.Module, without_ddp(state).module))
        if backbone is None:
            raise ConfigError(
                "model.freeze_backbone: this network has no known backbone; remove the key"
            )
        if event == Event.INIT:
            return
        is_frozen = state.timestamp.get(self.duration.unit) < self.duration
        # After each evaluation, the trainer puts the whole network into training mode, so put the
        # backbone back into evaluation mode.
        if is_frozen:
            backbone.eval()
        elif self.is_frozen:
            backbone.train()
        if is_frozen != self.is_frozen:
            for optimizer in state.optimizers:
                _prepare_state(optimizer, list(backbone.parameters()))
            backbone.requires_grad_(not is_frozen)
            self.is_frozen = is_frozen


def _prepare_state(optimizer: Optimizer, weights: list[nn.Parameter]) -> None:
    """Create optimizer state filled with zeros for parameters that have not been updated yet.

    The zeros equal the optimizer's own initial state. Without this state, torch cannot load the
    optimizer from a checkpoint.
    """
    weights = [weight for weight in weights if not optimizer.state.get(weight)]
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # A learning rate of 0 turns off weight decay as well.
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
