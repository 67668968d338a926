"""The algorithms of a run, each in a module of its own that loads when it is configured."""

from __future__ import annotations

from composer.core import Algorithm

from training.schema import Config
from training.seeding import SeedMicrobatch


def build_algorithms(config: Config) -> list[Algorithm]:
    """Build a run's algorithms, in the order in which Composer runs them before a forward pass.

    An algorithm's module is imported only if the config asks for the algorithm.
    """
    # The others draw random numbers, so the seeding comes first.
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
