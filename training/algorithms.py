"""What the recipes add to a training step: MixUp, SAM and EMA, and the seeding all of it draws on.

Nothing in here counts steps or carries a generator's state along: what happens in a step follows
from the seed and the step's number, so a run resumed from a checkpoint goes on bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from types import MethodType
from typing import Any, cast

import composer.algorithms
import numpy as np
import torch
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.optim import Optimizer

from errors import ConfigError
from networks.base import backbone_of
from segmentation.losses import MixedTarget
from training.composer_internals import EMAParameters
from training.optimizer import laid_out_like


class SeedMicrobatch(Algorithm):
    """Seeds torch's and numpy's global generators before the forward pass of each micro-batch.

    Dropout and MixUp then depend on nothing but the seed, the batch's number, the pass over it (SAM
    makes two) and the micro-batch's place in the global batch: not on what was drawn before, on a
    resume, nor on how many ranks share the micro-batches.

    Put it first in the list of algorithms: that is the order they run in before a forward pass.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.samples = 0  # of this rank in the batch
        self.passes = 0  # over the batch so far
        self.microbatch = 0  # index in the global batch
        self.microbatch_size: float | None = None

    def match(self, event: Event, state: State) -> bool:
        """Run when a batch, a pass over it and the forward pass of a micro-batch begin."""
        return event in (Event.BATCH_START, Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Count, and seeds before a forward pass."""
        if event == Event.BATCH_START:
            self.samples = len(state.batch[0])
            self.passes = 0
        elif event == Event.BEFORE_TRAIN_BATCH:
            size = state.device_train_microbatch_size
            assert size is not None
            if size != self.microbatch_size:  # `auto` ran out of memory and starts the batch anew
                self.passes = 0
            self.microbatch_size = size
            self.passes += 1
            self.microbatch = dist.get_global_rank() * -(-self.samples // int(size))
        else:
            key = (self.seed, state.timestamp.batch.value, self.passes, self.microbatch)
            words = np.random.SeedSequence(key).generate_state(4)
            torch.manual_seed(int(words[0]) << 32 | int(words[1]))  # GPUs too, without waiting
            np.random.seed(words[2:])
            self.microbatch += 1


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
        backbone = backbone_of(cast(nn.Module, _network(state).module))
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


class MixUp(Algorithm):
    """Blends each photo of a micro-batch with another (Zhang et al. 2018, arXiv:1710.09412).

    Photos and random numbers are those of Composer's MixUp. The target becomes a
    `losses.MixedTarget`, both index targets and the coefficient, for which Composer's makes three
    dense (N, C, H, W) tensors.

    Args:
        alpha: The other photo's weight is min(z, 1 - z) for a z drawn from Beta(alpha, alpha);
            0 mixes nothing.

    Raises:
        ValueError: `alpha` is negative.
    """

    def __init__(self, alpha: float = 0.2):
        if alpha < 0:
            raise ValueError(f"MixUp needs alpha >= 0, not {alpha}")
        self.alpha = alpha

    def match(self, event: Event, state: State) -> bool:
        """Run before each training forward pass."""
        return event == Event.BEFORE_FORWARD

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Replace the micro-batch by the mixed one."""
        image, target = state.batch
        z = np.random.beta(self.alpha, self.alpha) if self.alpha else 0.0
        mixing = float(min(z, 1 - z))
        other = torch.randperm(len(image))
        if image.is_cuda:  # the host waits for a copy from memory that is not pinned
            other = other.pin_memory().to(image.device, non_blocking=True)
        mixed = torch.lerp(image, image[other], mixing)
        state.batch = (mixed, MixedTarget(target, target[other], mixing))


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


class EMA(composer.algorithms.EMA):
    """Keeps an exponential moving average of the weights and evaluates and saves it as the model.

    Composer's algorithm and checkpoint layout, except that the average is updated by one fused
    operation, keeps the same names with and without DDP (Composer's average silently stops when a
    run is resumed with one rank instead of several, or the reverse), and is not updated with the
    weights of a checkpoint that was just saved (Composer's, where a batch interval's checkpoint
    meets an epoch's update).

    The average is the model's weights in what a `CheckpointSaver` saves when its `save_interval`
    says so. In a checkpoint saved otherwise the model has the training weights and this
    algorithm's state (`ema_weights_active` False) the average; it resumes just as well.

    Args:
        half_life: Time string in batches or epochs after which a weight counts half.
        update_interval: Time string between updates, in the same unit; None for 1.
    """

    smoothing: float  # never None: there always is a half-life

    def __init__(self, half_life: str = "1000ba", update_interval: str | None = None):
        super().__init__(half_life=half_life, update_interval=update_interval)

    def match(self, event: Event, state: State) -> bool:
        """Run at updates and wherever the weights may have to be exchanged."""
        if event == self.update_event and not self.ema_started:
            self.ema_model = EMAParameters(_network(state))
            self.ema_started = True
        return super().match(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Update the average, or exchanges it with the training weights."""
        network = _network(state)
        if event == Event.INIT:
            self.ema_model = EMAParameters(network)  # for a checkpoint to be loaded into
            return
        if event in self.move_device_events:  # a checkpoint is loaded onto the CPU
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
        # BatchNorm's counters, rounded down as Composer's; together, for they are 100 and more.
        others = [name for name in names if not stored[name].is_floating_point()]
        for name in [name for name in others if stored[name].ndim]:  # a table, not a counter
            stored[name].copy_(values[name])
            others.remove(name)
        if others:
            counters = [stored[name] for name in others]
            now = torch.stack([values[name] for name in others])
            mean = torch.stack(counters) * self.smoothing + now * (1 - self.smoothing)
            torch._foreach_copy_(counters, list(mean.to(now.dtype).unbind()))

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        """Load a checkpoint's state; one of Composer's EMA, written under DDP, too."""
        names = self.ema_model.named_parameters_dict.keys()
        super().load_state_dict(state, strict)
        if names.isdisjoint(self.ema_model.named_parameters_dict):
            for stored in (self.ema_model.named_parameters_dict, self.ema_model.named_buffers_dict):
                consume_prefix_in_state_dict_if_present(stored, "module.")


def _network(state: State) -> nn.Module:
    """Return the model without DDP around it."""
    return cast(nn.Module, state.model.module) if state.is_model_ddp else state.model
