"""Tests of extras/prediction_files.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from predict import find_images
from tests.support.predict import image  # noqa: F401


def test_each_input_image_gets_a_unique_output_name(tmp_path: Path, image: np.ndarray):
    for name in ("a/x.jpg", "a/b/x.png", "x.png", "x.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files = list(find_images([f"{tmp_path}/a", f"{tmp_path}/*.png", f"{tmp_path}/x.*", "gone.jpg"]))
    assert [(str(path).removeprefix(f"{tmp_path}/"), name) for path, name in files] == [
        ("a/b/x.png", "b/x"),
        ("a/x.jpg", "x"),
        ("x.png", "x_2"),
        ("x.jpg", "x_3"),
        ("gone.jpg", "gone"),
    ]


def test_videos_and_images_get_distinct_output_names(tmp_path: Path):
    """A video's frame masks go to a folder that could otherwise clash with a folder of images."""
    names = ("drive/000001.jpg", "drive.mp4", "Yard.jpg", "yard.png", "b.mov", "b/c/d.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for order in (1, -1):
        files = dict(find_images([f"{tmp_path}/{name.split('/')[0]}" for name in names][::order]))
        # Images of an input folder are named relative to that folder.
        assert len({name.casefold() for name in files.values()}) == len(names)
        files = {
            str(path.relative_to(tmp_path)): name for path, name in find_images([str(tmp_path)])
        }
        assert files == {
            "Yard.jpg": "Yard",
            "b/c/d.png": "b/c/d",
            "b.mov": "b_2",
            "drive/000001.jpg": "drive/000001",
            "drive.mp4": "drive_2",
            "yard.png": "yard_2",
        }
