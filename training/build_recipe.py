"""Functions that build a run's algorithms and learning-rate schedule from its recipe."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sized
from dataclasses import asdict
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from composer import optim
from composer.core import Algorithm, DataSpec, State, Time, TimeUnit

from errors import ConfigError
from training.recipes import BASELINE, RECIPES
from training.schema import Config
from training.seeding import SeedMicrobatch

if TYPE_CHECKING:
    from dataset.counts import Counts
    from dataset.source import DataSource

log = logging.getLogger(__name__)


def build_algorithms(config: Config) -> list[Algorithm]:
    """Build a run's algorithms, in the order in which Composer calls them.

    The modules of algorithms that the config does not enable are not imported.
    """
    # SeedMicrobatch must come first, because it seeds the generators that the other algorithms use.
    algorithms: list[Algorithm] = [SeedMicrobatch(config.seed)]
    if config.model.name != "deeplabv3":
        from training.freeze import UnusedWeights

        algorithms.append(UnusedWeights())
    if config.model.freeze_backbone is not None:
        from training.freeze import FreezeBackbone

        algorithms.append(FreezeBackbone(config.model.freeze_backbone))
    if config.optimizer.clip_norm is not None:
        from composer.algorithms import GradientClipping

        algorithms.append(GradientClipping("norm", config.optimizer.clip_norm))

    recipe = config.recipe
    if recipe.ema is not None:
        from training.ema import EMA

        algorithms.append(EMA(recipe.ema.half_life, recipe.ema.update_interval))
    if recipe.sam is not None:
        from training.sam import SAM

        algorithms.append(SAM(recipe.sam.rho, recipe.sam.interval))
    if recipe.mixup is not None:
        from training.mixup import MixUp

        algorithms.append(MixUp(recipe.mixup.alpha))
    return algorithms


def count_training(config: Config, source: DataSource) -> Counts | None:
    """Count the classes in the training masks, if the class weights or the sampler need the counts.

    Raises:
        DataError: A mask cannot be read, or it contains an unknown label.
    """
    needed = config.model.class_weights == "auto" or config.train_dataset.rare_class_sampling
    if not needed or not config.is_train:
        return None
    from checkpointing.saver import on_first_process
    from dataset.counts import count_classes

    return on_first_process(lambda: count_classes(source))


def loss_weights(config: Config, counts: Counts | None) -> list[float] | None:
    """Return the weight of each class in the training loss, or None for equal weights.

    Args:
        config: Config of the run.
        counts: Class counts of the training masks, as returned by `count_training`.

    Raises:
        ConfigError: See `training.class_weights.class_weights`.
    """
    if config.model.class_weights is None or not config.is_train:
        return None
    from training.class_weights import class_weights

    return class_weights(config, counts)


class EpochSchedule(optim.ComposerScheduler):
    """A learning-rate schedule that stays aligned with epochs, even if the batch size changes.

    Composer's schedules count batches. After a run resumes with a different batch size or number of
    images, the batch number no longer shows how far the run has progressed. If both are the same as
    before, the learning rates are bit-identical to those of Composer's schedule.

    Args:
        schedule: Composer schedule that gives the learning rates.
        batch_size: Number of images in a batch over all ranks.
    """

    def __init__(self, schedule: optim.ComposerScheduler, batch_size: int):
        self.schedule, self.batch_size = schedule, batch_size

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        """Return the learning-rate factor at the current training time."""
        batch = self.scheduled_batch(state)
        if batch == state.timestamp.batch.value:
            return self.schedule(state)
        return self._at(state, batch, state.timestamp.sample.value)

    def scheduled_batch(self, state: State) -> int:
        """Return the run's progress, converted to batches of the current size.

        If the run's duration is not in epochs, return the number of completed batches.
        """
        now, length = state.timestamp, state.dataloader_len
        assert state.max_duration is not None
        if length is None or state.max_duration.unit != TimeUnit.EPOCH:
            return now.batch.value
        before = now.epoch.value * int(length)
        if before + now.batch_in_epoch.value == now.batch.value:
            return now.batch.value
        return before + -(-now.sample_in_epoch.value // self.batch_size)

    def before_last_batch(self, state: State) -> float:
        """Return the next step's factor, because Composer calls the schedule one batch early."""
        sample = state.timestamp.sample.value - self.batch_size
        return self._at(state, max(self.scheduled_batch(state) - 1, 0), max(sample, 0))

    def _at(self, state: State, batch: int, sample: int) -> float:
        moment = SimpleNamespace(
            timestamp=state.timestamp.copy(batch=batch, sample=sample),
            max_duration=state.max_duration,
            dataloader_len=state.dataloader_len,
        )
        return self.schedule(cast(State, moment))


def resumed_factor(
    schedule: EpochSchedule, state: State, config: Config, record: Mapping[str, Any] | None
) -> float | None:
    """Return the learning-rate factor for the next step of a resumed run.

    If no setting has changed, the checkpoint's learning rate is still correct, so return None.

    Args:
        schedule: Schedule of the run.
        state: State of the trainer, after a checkpoint is loaded.
        config: Config of the run.
        record: Config stored in the checkpoint, or None.
    """
    ours = json.loads(json.dumps(asdict(config)))
    keys = ("optimizer", "schedule", "max_duration")
    is_same = record is not None and all(record.get(key) == ours[key] for key in keys)
    if is_same and schedule.scheduled_batch(state) == state.timestamp.batch.value:
        return None
    return schedule.before_last_batch(state)


def build_schedule(config: Config) -> EpochSchedule:
    """Build the learning-rate schedule from `config.schedule` or the recipe's default."""
    schedule = config.schedule
    recipe = RECIPES[config.recipe_name] if config.recipe_name else BASELINE
    name = schedule.name or recipe.schedule
    # Composer's scheduler classes: the one without a warm-up, and the one with a warm-up.
    plain, with_warmup = {
        "cosine": (optim.CosineAnnealingScheduler, optim.CosineAnnealingWithWarmupScheduler),
        "poly": (optim.PolynomialScheduler, optim.PolynomialWithWarmupScheduler),
        "linear": (optim.LinearScheduler, optim.LinearWithWarmupScheduler),
        "constant": (optim.ConstantScheduler, optim.ConstantWithWarmupScheduler),
    }[name]
    arguments: dict[str, Any] = {} if name == "constant" else {"alpha_f": schedule.final}
    if name == "poly":
        arguments["power"] = schedule.power
    if schedule.warmup.startswith("0"):
        composers = plain(**arguments)
    else:
        composers = with_warmup(schedule.warmup, **arguments)
    return EpochSchedule(composers, config.train_dataset.batch_size)


def in_batches(text: str, batches_per_epoch: int, batch_size: int) -> float:
    """Convert a time string in epochs, batches or samples to a number of batches."""
    time = Time.from_timestring(text)
    per_unit = {
        TimeUnit.EPOCH: batches_per_epoch,
        TimeUnit.BATCH: 1,
        TimeUnit.SAMPLE: 1 / batch_size,
    }
    return time.value * per_unit[time.unit]


def check_lengths(config: Config, train_data: DataSpec | None) -> None:
    """Call `check_times` with the number of batches in an epoch, if there is training data."""
    if train_data is not None:
        check_times(config, len(cast(Sized, train_data.dataloader)))


def check_times(config: Config, batches_per_epoch: int) -> None:
    """Check that the warm-up and the EMA's half-life are shorter than the run.

    If the half-life is too long, log a warning, because evaluation would use averaged weights that
    hardly change during the run.

    Raises:
        ConfigError: The warm-up is not shorter than the run.
    """

    def batches(text: str) -> float:
        return in_batches(text, batches_per_epoch, config.train_dataset.batch_size)

    length = batches(config.max_duration)
    if batches(config.schedule.warmup) >= length:
        raise ConfigError(
            f"schedule.warmup: {config.schedule.warmup} is at least as long as the run "
            f"({length:.0f}ba); use a shorter warm-up"
        )
    ema = config.recipe.ema
    if ema is not None and batches(ema.half_life) > length:
        log.warning(
            "%s.ema.half_life=%s is longer than the run (%dba), so the averaged weights "
            "that evaluation scores will hardly change; use about a tenth of the run, %dba",
            config.recipe_name,
            ema.half_life,
            length,
            max(length // 10, 1),
        )
