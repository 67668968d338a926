"""Exponential moving average of the weights, used for evaluation and checkpoints."""

from __future__ import annotations

from itertools import chain
from typing import Any

import composer.algorithms
import torch
from composer.core import Event, State
from composer.loggers import Logger
from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from training.composer_internals import EMAParameters, without_ddp


class EMA(composer.algorithms.EMA):
    """An exponential moving average of the weights, used for evaluation and checkpoints.

    The algorithm and the checkpoint layout are Composer's, with three differences:

    - The average is updated in one fused operation.
    - The average's tensors have the same names with and without DDP. Composer's average silently
      stops updating if a run switches between one and several ranks when it resumes.
    - The average is never updated with its own weights. Composer does this if a checkpoint and an
      update fall on the same batch.

    A checkpoint saved at a `save_interval` contains the average as the model's weights. A
    checkpoint saved at another time contains the training weights instead, and the average in this
    algorithm's state (`ema_weights_active` is False). A run can resume from either kind of
    checkpoint.

    Args:
        half_life: Time after which a weight's influence on the average has halved, as a time string
            in batches or epochs.
        update_interval: Time between updates, as a time string in the same unit as `half_life`. By
            default, the average is updated after every batch or every epoch, depending on this
            unit.
    """

    # Composer declares both attributes as optional, but here they are always set: `smoothing`
    # follows from `half_life`, and the INIT event creates `ema_model`.
    smoothing: float
    ema_model: EMAParameters

    def __init__(self, half_life: str = "1000ba", update_interval: str | None = None):
        super().__init__(half_life=half_life, update_interval=update_interval)

    def match(self, event: Event, state: State) -> bool:
        """Return whether this event updates the average or swaps it with the training weights."""
        if event == self.update_event and not self.ema_started:
            self.ema_model = EMAParameters(without_ddp(state))
            self.ema_started = True
        return super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the average, or swap it with the training weights."""
        network = without_ddp(state)
        if event == Event.INIT:
            # Create the averaged tensors now, so that a checkpoint can be loaded into them.
            self.ema_model = EMAParameters(network)
            return
        # Loading a checkpoint leaves the averaged weights on the CPU, so move them to the network's
        # device.
        if event in self.move_device_events:
            self.ema_model.move_params_to_device(network)
        if event in (Event.BATCH_START, Event.EVAL_END, self.update_event):
            self._activate(network, average=False)
        if event in (Event.EVAL_START, *self.checkpoint_events):
            self._activate(network, average=True)
        if event == self.update_event:
            self._update(network)

    def _activate(self, network: nn.Module, average: bool) -> None:
        if self.ema_weights_active != average:
            self.ema_model.swap_params(network)
            self.ema_weights_active = average

    @torch.no_grad()
    def _update(self, network: nn.Module) -> None:
        stored = self.ema_model.named_parameters_dict | self.ema_model.named_buffers_dict
        values = dict(chain(network.named_parameters(), network.named_buffers()))
        names = stored.keys() & values.keys()
        floats = [name for name in names if stored[name].is_floating_point()]
        average = [stored[name] for name in floats]
        torch._foreach_lerp_(average, [values[name] for name in floats], 1 - self.smoothing)
        # Average all BatchNorm counters in one operation, because there are over 100 of them. Round
        # down, as Composer does.
        others = [name for name in names if not stored[name].is_floating_point()]
        # Integer tensors with one or more dimensions are lookup tables, not counters, so copy them.
        for name in [name for name in others if stored[name].ndim]:
            stored[name].copy_(values[name])
            others.remove(name)
        if others:
            counters = [stored[name] for name in others]
            now = torch.stack([values[name] for name in others])
            mean = torch.stack(counters) * self.smoothing + now * (1 - self.smoothing)
            torch._foreach_copy_(counters, list(mean.to(now.dtype).unbind()))

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Load the state from a checkpoint, even one that Composer's EMA wrote under DDP."""
        names = self.ema_model.named_parameters_dict.keys()
        super().load_state_dict(state, strict)
        if names.isdisjoint(self.ema_model.named_parameters_dict):
            for stored in (self.ema_model.named_parameters_dict, self.ema_model.named_buffers_dict):
                consume_prefix_in_state_dict_if_present(stored, "module.")
