"""Tests of extras/preparation/file_names.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from errors import DataError
from extras.preparation.suggest import suggest
from tests.support.suggest import blocks, random_image, save


def test_dissimilar_file_names_are_not_paired(tmp_path: Path) -> None:
    for n, name in enumerate(("street", "yard", "wood", "lake")):
        save(tmp_path / f"a/{name}.jpg", random_image(n))
        save(tmp_path / f"b/mask{n}of_street{n}.png", blocks(n))
    with pytest.raises(DataError, match="found 4 images and 4 masks, but no mask name matches"):
        suggest(str(tmp_path), 1)
