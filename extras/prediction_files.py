"""Functions that find the inputs of predict.py, name its outputs and encode them."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset.paths import IMAGE_SUFFIXES
from errors import UserError
from extras.video import VIDEO_SUFFIXES, read_comment
from files import check_outputs, encode_image

# predict.py stores this comment in each output file, so that later runs recognise the file.
COMMENT = "Written by predict.py"


def find_images(arguments: Sequence[str]) -> list[tuple[Path, str]]:
    """Find all images and videos among the files, folders and glob patterns in `arguments`.

    Folders are searched recursively. Every output has a different path, even for files that differ
    only in extension or case. A video's name also differs from that of any image folder, because
    its frames' class indices are written to a folder of that name.

    Args:
        arguments: Files, folders and glob patterns.

    Returns:
        The path of each file, and the name of its outputs without an extension.
    """
    # Each input's path and name, indexed by the input's resolved path.
    files: dict[Path, tuple[Path, str]] = {}
    for argument in arguments:
        found = [argument] if os.path.exists(argument) else glob.glob(argument, recursive=True)
        for place in map(Path, sorted(found) or [argument]):
            if not place.is_dir():
                files.setdefault(place.resolve(), (place, place.stem))
                continue
            for path in sorted(place.rglob("*")):
                if path.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                    name = str(path.relative_to(place).with_suffix(""))
                    files.setdefault(path.resolve(), (path, name))

    # Name the videos last, because their names must differ from the image folders' names.
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for videos in (False, True):
        for path, name in files.values():
            if is_video(path) is not videos:
                continue
            unique, number = name, 2
            while unique.casefold() in taken:
                unique, number = f"{name}_{number}", number + 1
            taken.add(unique.casefold())
            names[path] = unique
        taken |= {str(folder) for name in set(taken) for folder in Path(name).parents}
    return [(path, names[path]) for path, _ in files.values()]


def is_video(path: Path) -> bool:
    """Return whether a file has the extension of a video.

    Args:
        path: Path of the file.
    """
    return path.suffix.lower() in VIDEO_SUFFIXES


def encode_index(prediction: np.ndarray) -> bytes:
    """Encode class indices as a greyscale PNG: 8-bit for uint8 and 16-bit for uint16.

    Args:
        prediction: (H, W) class indices, uint8 or uint16.
    """
    info = PngInfo()
    info.add_text("Comment", COMMENT)
    return encode_image(".png", Image.fromarray(prediction), pnginfo=info)


def check_predictions(
    images: list[tuple[Path, str]], options: argparse.Namespace, is_camera: bool
) -> None:
    """Check that no output would overwrite an input or a file written by another program.

    Args:
        images: Input files and the names of their outputs; see `find_images`.
        options: Parsed command line of predict.py.
        is_camera: Whether the input is a camera.

    Raises:
        UserError: An output would overwrite an input or another program's file.
    """
    outputs = [(name, is_video(path)) for path, name in images]
    outputs += [("camera", True)] if is_camera else []
    files, folders = [], []
    for name, is_clip in outputs:
        target = os.path.join(options.out, name)
        if "overlay" in options.write:
            files.append(Path(f"{target}{'.mp4' if is_clip else '.jpg'}"))
        if "index" in options.write and is_clip:
            folders.append(Path(target))
        elif "index" in options.write:
            files.append(Path(f"{target}.png"))
    existing = [file for folder in folders for file in folder.glob("*.png") if file.stem.isdigit()]
    check_outputs([*files, *existing], [path for path, _ in images])
    for path in [*files, *existing]:
        if path.exists() and not _is_our_output(path):
            raise UserError(
                f"{path} already exists and was not written by predict.py; choose a different "
                "--out folder"
            )


def _is_our_output(path: Path) -> bool:
    """Return whether an earlier run of predict.py wrote the file."""
    if is_video(path):
        return read_comment(path) == COMMENT
    try:
        with Image.open(path) as image:
            comment = image.info.get("Comment" if path.suffix == ".png" else "comment")
            return comment in (COMMENT, COMMENT.encode())
    except (OSError, ValueError):
        return False
