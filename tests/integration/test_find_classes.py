"""`data.py --suggest` ignores the mixed values on blurred mask edges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from extras.preparation import suggest as suggestions
from extras.preparation.suggest import suggest
from tests.support.suggest import described, drawn_large, random_image, save, smooth


def scale(mask: np.ndarray) -> np.ndarray:
    small = cv2.resize(mask, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(small, mask.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def sharpen(
    mask: np.ndarray,
) -> np.ndarray:  # overshoots, so that some values are outside the range of the classes
    large = Image.fromarray(mask).resize((384, 384), Image.Resampling.LANCZOS)
    return np.array(large.resize((256, 256), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("of", ["grey", "colours"])
@pytest.mark.parametrize("blur", [smooth, scale, sharpen])
def test_suggested_description_ignores_blurred_mask_edges(
    blur: Callable, of: str, tmp_path: Path
) -> None:
    for n in range(24):
        save(tmp_path / f"i/{n:02}.jpg", cv2.resize(random_image(n), (256, 256)))
        save(tmp_path / f"m/{n:02}.png", drawn_large(n, of, blur if n == 13 else None))
    suggestion = suggest(str(tmp_path), 1)
    raw = yaml.safe_load(suggestion.text)
    assert len(raw["classes"]) == 3 and len(raw["ignore"]) > 3
    assert "suspected edges" in suggestion.text and "in 1 files: m/13.png." in suggestion.text
    # The first sample in the picture has the blurred mask, with ignored pixels along its edges.
    description, samples = described(tmp_path, suggestion.text)
    every = [*samples["train"], *samples["val"]]
    first = [sample for sample in every if sample.mask_path.endswith("13.png")]
    only = suggestions.draw(description, first, str(tmp_path), [])
    assert (np.array(suggestion.picture)[:300, :600] == np.array(only)[:300, :600]).all()
