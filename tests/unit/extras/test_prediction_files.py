"""Tests of extras/prediction_files.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from predict import find_photos
from tests.support.predict import photo  # noqa: F401


def test_finds_photos(tmp_path: Path, photo: np.ndarray):
    for name in ("a/x.jpg", "a/b/x.png", "x.png", "x.jpg", "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = list(find_photos([f"{tmp_path}/a", f"{tmp_path}/*.png", f"{tmp_path}/x.*", "gone.jpg"]))
    assert [(str(path).removeprefix(f"{tmp_path}/"), name) for path, name in found] == [
        ("a/b/x.png", "b/x"),
        ("a/x.jpg", "x"),
        ("x.png", "x_2"),
        ("x.jpg", "x_3"),
        ("gone.jpg", "gone"),
    ]


def test_videos_and_images_have_outputs_of_their_own(tmp_path: Path):
    """The indices of a video's frames go to a folder, which may be that of images."""
    names = ("drive/000001.jpg", "drive.mp4", "Yard.jpg", "yard.png", "b.mov", "b/c/d.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for order in (1, -1):
        found = dict(find_photos([f"{tmp_path}/{name.split('/')[0]}" for name in names][::order]))
        # A folder that is named gives its images their names inside.
        assert len({name.casefold() for name in found.values()}) == len(names)
        found = {
            str(path.relative_to(tmp_path)): name for path, name in find_photos([str(tmp_path)])
        }
        assert found == {
            "Yard.jpg": "Yard",
            "b/c/d.png": "b/c/d",
            "b.mov": "b_2",
            "drive/000001.jpg": "drive/000001",
            "drive.mp4": "drive_2",
            "yard.png": "yard_2",
        }
