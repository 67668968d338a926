"""Class weights for the loss, and repeat factors for images that contain rare classes."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

import numpy as np

from dataset.counts import Counts, count_classes
from dataset.source import DataSource
from errors import ConfigError
from segmentation.classes import ClassInfo
from training.config import class_infos
from training.schema import Config

log = logging.getLogger(__name__)

FORMULA = "1 / ln(1.02 + share), Paszke et al. 2016 (https://arxiv.org/abs/1606.02147)"


def class_weights(config: Config, counts: Counts | None) -> list[float]:
    """Return the weight of each class in the training loss, as set by `model.class_weights`.

    Args:
        config: Config of the run.
        counts: Class counts of the training masks, required for `auto`.

    Raises:
        ConfigError: A weight is given for an unknown class, or the weights are `auto` but the data
            does not come from the config, so that there are no counts.
    """
    given, classes = config.model.class_weights, class_infos(config)
    if given == "auto":
        if counts is None:
            raise ConfigError(
                "model.class_weights: auto needs the masks of train_dataset, but this run "
                "uses different data; give the weights as numbers"
            )
        weights = auto_weights(counts.pixels)
        log.info("class_weights: auto, %s: %s", FORMULA, named(weights, classes))
        return weights
    if isinstance(given, dict):
        names = [info.name for info in classes]
        by_name = {str(name): float(weight) for name, weight in given.items()}
        for name in by_name:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
                raise ConfigError(
                    f"model.class_weights: no class is named {name}; did you mean {near}?"
                )
        return [by_name.get(name, 1.0) for name in names]
    return [float(weight) for weight in given]


def named(weights: Sequence[float], classes: Sequence[ClassInfo]) -> str:
    """Format the class names and their weights as one line of text."""
    pairs = zip(classes, weights, strict=True)
    return ", ".join(f"{info.name} {weight:.4g}" for info, weight in pairs)


def auto_weights(pixels: np.ndarray) -> list[float]:
    """Return the class weights; the rarer a class, the larger its weight (see `FORMULA`).

    The weights range from 1.42, for a class that covers all pixels, to 50.5, for a class that
    covers none.
    """
    share = pixels / max(pixels.sum(), 1)
    return (1 / np.log(1.02 + share)).tolist()


def sample_factors(
    source: DataSource, threshold: float, counts: Counts | None = None
) -> np.ndarray:
    """Return the `repeat_factors` of a split's images, from its class counts or its masks."""
    counts = count_classes(source) if counts is None else counts
    return repeat_factors(counts.present, threshold)


def repeat_factors(present: np.ndarray, threshold: float) -> np.ndarray:
    """Return how often each image is used in an epoch, on average.

    A class that occurs in a fraction f of the images has the factor max(1, sqrt(threshold / f)). An
    image's factor is the largest factor among its classes (Gupta, Dollár and Girshick 2019, LVIS,
    section 4.2, https://arxiv.org/abs/1908.03195).

    Args:
        present: (samples, C) bool array that tells which classes occur in each image.
        threshold: Fraction of the images below which a class counts as rare.

    Returns:
        A (samples,) float64 array of factors, each at least 1.
    """
    share = present.mean(0)
    by_class = np.sqrt(threshold / np.where(share > 0, share, threshold)).clip(min=1)
    return np.where(present, by_class, 1.0).max(1)
