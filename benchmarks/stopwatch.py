"""Measure how much time each part of a training step takes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, cast

import torch
from composer import Callback, Trainer
from composer.core import State
from composer.loggers import Logger

from model import DeepLabV3
from training.composer_internals import TRAINER_METHODS, train_data_spec

PARTS = (
    "backbone",
    "head",
    "loss",
    "metrics",
    "algorithms",
    "optimizer",
    "data transform",
    "waiting for data",
    "rest",
)


class Stopwatch(Callback):
    """A callback that measures the time of each part of a training step.

    The callback waits for the GPU before each time measurement. The time of a part includes its
    forward and backward passes. The loss time includes the upsampling of the logits. An algorithm's
    time is added to the part that calls the algorithm. For example, the optimizer's time includes
    SAM's additional pass.

    Args:
        trainer: Trainer to time, whose network must have the attributes `backbone` and
            `classifier`.
        compile_parts: Whether to compile the backbone and the head separately. Parts of a single
            compiled graph cannot be timed.
    """

    def __init__(self, trainer: Trainer, compile_parts: bool = False) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._parts = ["rest"]
        self._since = time.perf_counter()
        trainer.state.callbacks.append(self)
        network = cast(DeepLabV3, trainer.state.model.module)
        for part in (network.backbone, network.classifier):
            if compile_parts:
                part.forward = torch.compile(part.forward, dynamic=False)
        network.backbone.forward = self._timed(network.backbone.forward, "backbone")
        network.classifier.forward = self._head(network.classifier.forward)
        spec = train_data_spec(trainer)
        spec.microbatch_transforms = self._timed(spec.microbatch_transforms, "data transform")
        for method, name in zip(TRAINER_METHODS, ("rest", "metrics", "metrics"), strict=True):
            setattr(trainer, method, self._timed(getattr(trainer, method), name))
        for optimizer in trainer.state.optimizers:
            optimizer.step = self._timed(optimizer.step, "optimizer")
        for algorithm in trainer.state.algorithms:
            algorithm.apply = self._timed(algorithm.apply, "algorithms")

    def milliseconds(self) -> dict[str, float]:
        """Return the mean time of each part per step, in milliseconds."""
        return {part: 1e3 * self.seconds[part] / max(self.steps, 1) for part in PARTS}

    def _count(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._parts[-1]] += now - self._since
        self._since = now

    def _enter(self, part: str) -> None:
        self._count()
        self._parts.append(part)

    def _leave(self) -> None:
        self._count()
        self._parts.pop()

    def _become(self, part: str) -> None:
        self._count()
        self._parts[-1] = part

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._leave()

        return timed

    def _head(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return the head's forward pass with timers, and hooks that time the backward pass."""
        forward = self._timed(forward, "head")

        def timed(features: Any) -> Any:
            logits = forward(features)
            if logits.requires_grad:
                logits.register_hook(lambda _: self._become("head"))
                # Hook the backbone's last feature map, because its gradient marks the start of the
                # backbone's backward pass. The gradient of the first feature map comes much later.
                features[-1].register_hook(lambda _: self._become("backbone"))
                self._enter("loss")
            return logits

        return timed

    def after_loss(self, state: State, logger: Logger) -> None:
        self._leave()

    def before_backward(self, state: State, logger: Logger) -> None:
        self._enter("loss")

    def after_backward(self, state: State, logger: Logger) -> None:
        self._leave()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        self._count()
        # Reset the stack of parts for each batch, because Composer does not call
        # `after_dataloader` at the end of an epoch.
        self._parts = ["rest", "waiting for data"]

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._leave()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.steps == 0:  # Exclude the loader's start-up time.
            self.seconds.clear()
        self.steps += 1

    def fit_end(self, state: State, logger: Logger) -> None:
        self._count()
