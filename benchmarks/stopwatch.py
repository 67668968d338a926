"""Where the time of a training step goes, part by part."""

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
    """Gives every moment of a trainer's steps to one part, each time after the device is done.

    Forward and backward pass are counted together. Upsampling the logits belongs to the loss, and
    the algorithms to where they run: SAM's climb is the optimizer's.

    Args:
        trainer: Whose steps are timed from now on; its model's `module` has `backbone` and
            `classifier`.
        compile_parts: Compile backbone and head, each by itself. (Within the graph of the whole
            model there is no moment between them.)
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
        """Return the mean step's."""
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
        """Time the head's forward pass and, by hooks, the parts of the backward pass."""
        forward = self._timed(forward, "head")

        def timed(features: Any) -> Any:
            logits = forward(features)
            if logits.requires_grad:
                logits.register_hook(lambda _: self._become("head"))
                # Its last: the first's gradient is complete only far back in the backbone.
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
        self._parts = ["rest", "waiting for data"]  # nothing has left where an epoch has ended

    def after_dataloader(self, state: State, logger: Logger) -> None:
        self._leave()

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.steps == 0:  # the first wait was for the loader's start
            self.seconds.clear()
        self.steps += 1

    def fit_end(self, state: State, logger: Logger) -> None:
        self._count()
