"""Conversion of a small data set into shards, and a check of the shards that were written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from convert_ade20k import convert
from data import StreamingADE20k
from dataset.matching import list_samples
from tests.support.s3_server import s3_server


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def path(synthetic, tmp_path) -> Path:
    """Return a copy of the data set that a test may change."""
    return Path(shutil.copytree(synthetic, tmp_path / "set"))


def write(path: Path | str, out: Path | str, **options) -> dict[str, int]:
    """Convert the data set into a few shards per split with one worker process."""
    return convert(str(path), str(out), **{"size_limit": "10kb", "workers": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    paths = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in paths}


def check_shards(path: Path | str, shards: StreamingADE20k, split: str) -> None:
    """Assert that the shards contain every sample in order, with the exact bytes of its files."""
    samples = list_samples(str(path), split)
    assert len(shards) == len(samples)
    for index, sample in enumerate(samples):
        uid, image, mask, _ = shards.read(index)
        assert uid == sample.uid
        assert image == Path(sample.image_path).read_bytes()
        assert mask == Path(sample.mask_path).read_bytes()


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server
