"""Sharpness-aware minimisation as a step of the optimizer."""

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
    """Sharpness-aware minimisation (Foret et al. 2021, arXiv:2010.01412).

    Every `interval`-th step climbs by `rho` along the gradient, computes the gradient there, and
    applies that to the weights it started from. Each rank climbs along the gradient of its own part
    of the batch.

    Composer's SAM wraps the optimizer once a checkpoint has been loaded, then saves the wrapper in
    its place: momentum and the count of steps are lost on a resume. This one replaces the
    optimizer's `step` and keeps no state, so the optimizer is saved and loaded as if there were no
    SAM, and the learning-rate schedule drives its groups. Also unlike Composer's, the weights
    return to exactly what they were, after a pass that failed too, and a loss of 0 skips no step.

    Args:
        rho: Length of the climb, in the 2-norm over all weights.
        interval: Steps from one climb to the next; a step that climbs takes twice the time.

    Raises:
        ValueError: `rho` is not above 0, or `interval` is not at least 1.
    """

    def __init__(self, rho: float = 0.05, interval: int = 1):
        if rho <= 0 or interval < 1:
            raise ValueError(f"SAM needs rho > 0 and interval >= 1, not {rho} and {interval}")
        self.rho = rho
        self.interval = interval

    def match(self, event: Event, state: State) -> bool:
        """Run once, before the trainer makes the schedule and the gradient scaler."""
        return event == Event.INIT

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the optimizer's step."""
        (optimizer,) = state.optimizers
        plain_step = optimizer.step

        def step(optimizer: Optimizer, closure: Callable[..., Any] | None = None) -> Any:
            if closure is None:
                return plain_step()
            climb = (state.timestamp.batch.value + 1) % self.interval == 0
            loss = closure(ddp_sync=False) if climb else closure()
            if loss is None:  # the gradient overflowed in fp16
                return None
            if climb:
                with _climbed(optimizer, self.rho):
                    if closure(loss_dict={}) is None:  # this pass's losses are not logged
                        return loss
            plain_step()
            return loss

        optimizer.step = MethodType(step, optimizer)
        # For the trainer, which looks for it on any optimizer: closures in fp16 as well.
        optimizer._step_supports_amp_closure = True  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _climbed(optimizer: Optimizer, rho: float) -> Iterator[None]:
    """Add `rho` times the normalised gradient to the weights, and bring them back at the end.

    The sum takes the gradient's memory, and the weights' own stays untouched meanwhile: nothing is
    copied, there or back.
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
        weight.data = sum_.as_strided(weight.shape, weight.stride())  # a compiled graph's guard
    try:
        yield
    finally:
        for weight, data in zip(weights, start, strict=True):
            weight.data = data
