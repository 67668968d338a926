"""Tests of extras/preparation/find_layout.py."""

from __future__ import annotations

from pathlib import Path

import yaml

from extras.preparation.suggest import suggest
from tests.support.suggest import N, blocks, lay_out, random_image, save


def test_newest_version_of_the_semantic_masks_is_preferred(tmp_path: Path) -> None:
    for n in range(8):
        save(tmp_path / f"images/{n}.jpg", random_image(n))
        save(tmp_path / f"SegmentationObject/{n}.png", blocks(n))
        for version in (1, 2):
            save(tmp_path / f"SegmentationClass_v{version}/{n}.png", blocks(n))
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["train"]["masks"] == "SegmentationClass_v2/{stem}.png"
    assert "# 16 masks are left out, such as SegmentationClass_v1/0.png." in text
    assert "# A guess: SegmentationClass_v1/{stem}.png would match as many images" in text


def test_only_one_of_two_dataset_copies_is_used(tmp_path: Path) -> None:
    for n in range(8):
        for version in ("v1", "v2"):
            save(tmp_path / f"{version}/images/{n}.jpg", random_image(n))
            save(tmp_path / f"{version}/masks/{n}.png", blocks(n))
    text = suggest(str(tmp_path), 1).text
    assert yaml.safe_load(text)["train"]["masks"] == "v2/masks/{stem}.png"
    assert "# 8 images and 8 masks are left out, such as v1/images/0.jpg" in text


def test_suggestion_lists_an_image_without_a_mask(tmp_path: Path) -> None:
    lay_out(tmp_path, [("a/{}.jpg", "b/{}.png", N), ("a/{}.jpg", "", ["logo"])])
    text = suggest(str(tmp_path), 1).text
    assert f"# To do before training: {tmp_path}/a/logo.jpg: " in text
    assert "# 1 image is left out, such as a/logo.jpg." in text
