"""Sharpness-aware minimisation, implemented by replacing the optimizer's step method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, cast

import torch
from composer.core import Algorithm, Event, State
from composer.loggers import Logger
from torch import Tensor
from torch.optim import Optimizer

from training.optimizer import laid_out_like


class SAM(Algorithm):
    """Sharpness-aware minimisation (SAM; Foret et al. 2021, https://arxiv.org/abs/2010.01412).

    Every `interval`-th step moves the weights by `rho` along the gradient, computes the gradient at
    the new point, and applies this gradient to the original weights. Each rank moves along the
    gradient of its own share of the batch.

    Composer's SAM wraps the optimizer and saves only the wrapper, so a resumed run loses the
    momentum and the step count. This version has no state, because it only replaces the optimizer's
    `step` method. The optimizer is therefore saved, loaded and scheduled as usual. This version
    also restores the exact weights, even if a pass fails, and takes the step even if the loss is 0.

    Args:
        rho: Distance to move the weights, in the 2-norm over all weights.
        interval: Number of steps from one SAM step to the next. A SAM step takes twice as long as
            an ordinary step.

    Raises:
        ValueError: `rho` is not positive, or `interval` is less than 1.
    """

    def __init__(self, rho: float = 0.05, interval: int = 1):
        if rho <= 0 or interval < 1:
            raise ValueError(
                f"got rho={rho} and interval={interval}; SAM needs rho > 0 and interval >= 1"
            )
        self.rho = rho
        self.interval = interval

    def match(self, event: Event, state: State) -> bool:
        """Return whether the trainer is about to build the schedule and the gradient scaler."""
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the optimizer's `step` method."""
        (optimizer,) = state.optimizers
        plain_step = optimizer.step

        def step(optimizer: Optimizer, closure: Callable[..., Any] | None = None) -> Any:
            if closure is None:
                return plain_step()
            climb = (state.timestamp.batch.value + 1) % self.interval == 0
            loss = closure(ddp_sync=False) if climb else closure()
            if loss is None:  # The gradient overflowed in fp16, so skip this step.
                return None
            if climb:
                with _climbed(optimizer, self.rho):
                    # Keep the losses of SAM's second pass out of the logs.
                    if closure(loss_dict={}) is None:
                        return loss
            plain_step()
            return loss

        # Replace the step, and tell Composer's trainer that the new one accepts closures in fp16.
        optimizer.step = MethodType(step, optimizer)
        optimizer._step_supports_amp_closure = True  # pyrefly: ignore[missing-attribute]


@contextmanager
def _climbed(optimizer: Optimizer, rho: float) -> Iterator[None]:
    """Add `rho` times the normalised gradient to the weights, and restore them afterwards.

    The moved weights reuse the memory of the gradient. The original weights stay where they are, so
    restoring them needs no copy.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    start = [p.data for p in weights]
    with torch.no_grad():
        climbed = [laid_out_like(p, cast(Tensor, p.grad)) for p in weights]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(climbed)))
        torch._foreach_mul_(climbed, rho / (norm + 1e-12))
        torch._foreach_add_(climbed, start)
    for weight, sum_ in zip(weights, climbed, strict=True):
        weight.grad = None
        # Keep the original strides, because a compiled graph checks the strides of its weights.
        weight.data = sum_.as_strided(weight.shape, weight.stride())
    try:
        yield
    finally:
        for weight, data in zip(weights, start, strict=True):
            weight.data = data
