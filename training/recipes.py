"""The recipes: which algorithms and which learning-rate schedule a run trains with.

| recipe | EMA | SAM            | MixUp | schedule | duration   |
|--------|-----|----------------|-------|----------|------------|
| none   |     |                |       | cosine   | 128 epochs |
| mild   | yes |                |       | constant | 25 epochs  |
| medium | yes | every 2nd step | yes   | constant | 90 epochs  |
| hot    | yes | every step     | yes   | cosine   | 240 epochs |

The numbers are keys of the YAML, below the recipe's name. Published as "5x faster or +4.6 mIoU" at
https://www.mosaicml.com/blog/mosaic-image-segmentation.
"""

from __future__ import annotations

import logging
from typing import Any

from composer import optim
from composer.algorithms import GradientClipping
from composer.core import Algorithm, Time, TimeUnit

from errors import ConfigError
from training.algorithms import EMA, SAM, FreezeBackbone, MixUp, SeedMicrobatch, UnusedWeights
from training.schema import Config

log = logging.getLogger(__name__)


def build_recipe(config: Config) -> tuple[list[Algorithm], optim.ComposerScheduler]:
    """Build the algorithms of `config.recipe_name`, in the order they run, and the schedule."""
    algorithms: list[Algorithm] = [SeedMicrobatch(config.seed)]
    if config.model.name != "deeplabv3":
        algorithms.append(UnusedWeights())
    if config.model.freeze_backbone is not None:
        algorithms.append(FreezeBackbone(config.model.freeze_backbone))
    if config.optimizer.clip_norm is not None:
        algorithms.append(GradientClipping("norm", config.optimizer.clip_norm))
    if config.recipe_name is None:
        return algorithms, build_schedule(config)
    recipe = getattr(config, config.recipe_name)
    algorithms.append(EMA(recipe.ema.half_life, recipe.ema.update_interval))
    if config.recipe_name in ("medium", "hot"):
        algorithms.append(SAM(recipe.sam.rho, recipe.sam.interval))
        algorithms.append(MixUp(recipe.mixup.alpha))
    return algorithms, build_schedule(config)


def build_schedule(config: Config) -> optim.ComposerScheduler:
    """Build Composer's scheduler: what `config.schedule` says, else the recipe's."""
    schedule = config.schedule
    recipes_own = "constant" if config.recipe_name in ("mild", "medium") else "cosine"
    arguments: dict[str, Any] = {
        "cosine": {"alpha_f": schedule.final},
        "poly": {"alpha_f": schedule.final, "power": schedule.power},
        "linear": {"alpha_f": schedule.final},
        "constant": {},
    }[name := schedule.name or recipes_own]
    plain, with_warmup = {
        "cosine": (optim.CosineAnnealingScheduler, optim.CosineAnnealingWithWarmupScheduler),
        "poly": (optim.PolynomialScheduler, optim.PolynomialWithWarmupScheduler),
        "linear": (optim.LinearScheduler, optim.LinearWithWarmupScheduler),
        "constant": (optim.ConstantScheduler, optim.ConstantWithWarmupScheduler),
    }[name]
    if schedule.warmup.startswith("0"):
        return plain(**arguments)
    return with_warmup(schedule.warmup, **arguments)


def in_batches(text: str, batches_per_epoch: int, batch_size: int) -> float:
    """Return a time string, in `ep`, `ba` or `sp`, in batches."""
    time = Time.from_timestring(text)
    per_unit = {
        TimeUnit.EPOCH: batches_per_epoch,
        TimeUnit.BATCH: 1,
        TimeUnit.SAMPLE: 1 / batch_size,
    }
    return time.value * per_unit[time.unit]


def check_lengths(config: Config, batches_per_epoch: int) -> None:
    """Compare times that only the length of an epoch makes comparable.

    An average that is evaluated although it will hardly have moved is warned about.

    Raises:
        ConfigError: The warm-up does not end before the run.
    """

    def batches(text: str) -> float:
        return in_batches(text, batches_per_epoch, config.train_dataset.batch_size)

    length = batches(config.max_duration)
    if batches(config.schedule.warmup) >= length:
        raise ConfigError(
            f"schedule.warmup: {config.schedule.warmup} is not less than the run's {length:.0f}ba"
        )
    if config.recipe_name is None:
        return
    half_life = getattr(config, config.recipe_name).ema.half_life
    if batches(half_life) > length:
        log.warning(
            "%s.ema.half_life=%s is longer than the run (%dba): evaluation scores the averaged "
            "weights, which will hardly have moved; a tenth of the run would be %dba",
            config.recipe_name,
            half_life,
            length,
            max(length // 10, 1),
        )
