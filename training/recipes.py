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

from composer.core import Algorithm, Time, TimeUnit
from composer.optim import ComposerScheduler, ConstantScheduler, CosineAnnealingScheduler

from training.algorithms import EMA, SAM, MixUp, SeedMicrobatch
from training.schema import Config

log = logging.getLogger(__name__)


def build_recipe(config: Config) -> tuple[list[Algorithm], ComposerScheduler]:
    """Build the algorithms of `config.recipe_name`, in the order they run, and its schedule."""
    algorithms: list[Algorithm] = [SeedMicrobatch(config.seed)]
    if config.recipe_name is None:
        return algorithms, CosineAnnealingScheduler()
    recipe = getattr(config, config.recipe_name)
    algorithms.append(EMA(recipe.ema.half_life, recipe.ema.update_interval))
    if config.recipe_name in ("medium", "hot"):
        algorithms.append(SAM(recipe.sam.rho, recipe.sam.interval))
        algorithms.append(MixUp(recipe.mixup.alpha))
    hot = config.recipe_name == "hot"
    return algorithms, CosineAnnealingScheduler() if hot else ConstantScheduler()


def warn_if_ema_is_slow(config: Config, batches_per_epoch: int) -> None:
    """Say so when the run ends before the average that is evaluated has moved."""
    if config.recipe_name is None:
        return

    def batches(text: str) -> float:
        time = Time.from_timestring(text)
        per_unit = {
            TimeUnit.EPOCH: batches_per_epoch,
            TimeUnit.BATCH: 1,
            TimeUnit.SAMPLE: 1 / config.train_dataset.batch_size,
        }
        return time.value * per_unit[time.unit]

    half_life = getattr(config, config.recipe_name).ema.half_life
    length = batches(config.max_duration)
    if batches(half_life) > length:
        log.warning(
            "%s.ema.half_life=%s is longer than the run (%dba): evaluation scores the averaged "
            "weights, which will hardly have moved; a tenth of the run would be %dba",
            config.recipe_name,
            half_life,
            length,
            max(length // 10, 1),
        )
