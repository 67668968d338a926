"""The three training recipes, with their durations, schedules and algorithms.

MosaicML published the recipes as "5x faster or +4.6 mIoU"
(https://www.mosaicml.com/blog/mosaic-image-segmentation). Every number here is the default of a key
in the recipe's config section, such as `hot.sam.rho`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

from training.keys import APPLIED, key


@dataclass
class EMAConfig:
    """Settings of the exponential moving average of the weights."""

    half_life: str = key(APPLIED, "1000ba", "half-life of the averaged weights")
    update_interval: str = key(APPLIED, "10ba", "time between updates of the average")


@dataclass
class SAMConfig:
    """Settings of sharpness-aware minimisation (https://arxiv.org/abs/2010.01412)."""

    rho: float = key(APPLIED, 0.3, "radius of SAM's neighbourhood in weight space", "(0, inf)")
    interval: int = key(APPLIED, 2, "steps from one SAM step to the next", "[1, inf)")


@dataclass
class MixUpConfig:
    """Settings of MixUp, which blends pairs of images (https://arxiv.org/abs/1710.09412)."""

    alpha: float = key(
        APPLIED, 0.2, "MixUp's coefficient is drawn from Beta(alpha, alpha)", "[0, 1000]"
    )


@dataclass
class RecipeConfig:
    """The config keys of one recipe."""

    max_duration: str = key(APPLIED, "", "duration of the recipe")
    ema: EMAConfig | None = None
    sam: SAMConfig | None = None
    mixup: MixUpConfig | None = None


@dataclass(frozen=True)
class Recipe:
    """A training recipe.

    Args:
        max_duration: Duration of the run, as a Composer time string.
        schedule: Name of the default learning-rate schedule, used if `schedule.name` is empty.
        ema: Settings of the moving average, or None for no average.
        sam: Settings of sharpness-aware minimisation, or None for no SAM.
        mixup: Settings of MixUp, or None for no MixUp.
    """

    max_duration: str
    schedule: str
    ema: EMAConfig | None = None
    sam: SAMConfig | None = None
    mixup: MixUpConfig | None = None

    def section(self) -> RecipeConfig:
        """Return this recipe's config keys with their defaults."""
        algorithms = copy.deepcopy((self.ema, self.sam, self.mixup))
        return RecipeConfig(self.max_duration, *algorithms)


BASELINE = Recipe("128ep", "cosine")
RECIPES = {
    "mild": Recipe("25ep", "constant", EMAConfig("1000ba", "10ba")),
    "medium": Recipe(
        "90ep", "constant", EMAConfig("1000ba", "10ba"), SAMConfig(0.3, 2), MixUpConfig(0.2)
    ),
    "hot": Recipe(
        "240ep", "cosine", EMAConfig("2000ba", "1ba"), SAMConfig(0.3, 1), MixUpConfig(0.5)
    ),
}
