"""A data set for `python data.py PATH`, functions that damage its files, and the report."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data import build_ade20k_dataspec
from extras.preparation import check_command
from extras.preparation.synthetic import make

ROOT = "ADEChallengeData2016"
main = functools.partial(check_command.main, build_dataspec=build_ade20k_dataspec)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("original")
    make(str(path), training=24, validation=4, size=48)
    return path


@pytest.fixture
def path(original, tmp_path) -> Path:
    """Return a copy of the data set that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "set"))


def sample(path: Path, number: int) -> tuple[Path, Path]:
    """Return the image and the mask of a training sample."""
    name = f"training/ADE_train_{number:08d}"
    return path / ROOT / f"images/{name}.jpg", path / ROOT / f"annotations/{name}.png"


def run(capsys, *arguments: str | Path) -> tuple[int, dict]:
    """Run data.py with `--json`; return its exit status and its report."""
    arguments = [*map(str, arguments), "--num-classes", "12", "--json"]
    status = main(arguments)
    return status, json.loads(capsys.readouterr().out)


def labels_of(mask: Path) -> np.ndarray:
    return np.array(Image.open(mask))


def write(file: Path, content: bytes | np.ndarray) -> None:
    is_image = isinstance(content, np.ndarray)
    file.write_bytes(cv2.imencode(file.suffix, content)[1].tobytes() if is_image else content)


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def wrong_label(image: Path, mask: Path) -> None:
    labels = labels_of(mask)
    labels[3, 5] = 77
    write(mask, labels)
