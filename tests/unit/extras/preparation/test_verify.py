"""Tests of extras/preparation/verify.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dataset.description import ade20k
from dataset.labels import Labels
from dataset.mask_decoder import Masks
from dataset.source import Chunk, DataSource, ShardOptions
from errors import DataError
from extras.preparation.verify import Tally, check_chunk, read_pair
from tests.support.report import cut, labels_of, original, path, sample, write  # noqa: F401
from tests.support.streaming import write as write_shards


def tally_of(chunks: list[tuple[Chunk, Masks]]) -> Tally:
    """Check all chunks of a split in this process; return the total."""
    total = Tally()
    for chunk, masks in chunks:
        total.add(check_chunk(chunk, masks))
    return total


def test_pixels_and_images_of_each_label_are_counted(path: Path, tmp_path: Path) -> None:
    expected = [labels_of(sample(path, number)[1]) for number in range(1, 25)]
    pixels = sum(np.bincount(labels.ravel(), minlength=256) for labels in expected)
    shards = write_shards(str(path), tmp_path / "mds")
    for where, options in ((str(path), None), (shards, ShardOptions())):
        tally = tally_of(DataSource(where, "train", ade20k(Labels(12)), options).chunks())
        assert (len(tally.sizes), set(tally.sizes), len(tally.names_by_hash)) == (
            24,
            {(48, 48)},
            24,
        )
        assert tally.pixels[1:13].tolist() == pixels[1:13].tolist()
        assert tally.present[1:13].tolist() == [
            sum((labels == label).any() for labels in expected) for label in range(1, 13)
        ]
        assert tally.findings == []


def test_each_faulty_file_is_named_with_its_problem(path: Path) -> None:
    chunks = DataSource(str(path), "train", ade20k(Labels(12))).chunks()
    images, masks = zip(*(sample(path, number) for number in range(1, 5)))
    cut(images[0], 0.5)
    cut(masks[1], 0.5)
    images[2].unlink()
    write(masks[3], np.zeros((48, 48), np.uint8))
    total = tally_of(chunks)
    problems = {path: (reason, fatal) for path, reason, fatal in total.findings}
    assert problems.keys() == {str(file) for file in (images[0], masks[1], images[2], masks[3])}
    assert problems[str(images[2])] == ("cannot be read: No such file or directory", True)
    assert problems[str(masks[3])][0].startswith("no pixel has a class")
    assert [fatal for _, fatal in problems.values()].count(False) == 1
    assert len(total.sizes) == 21  # A mask without classes does not prevent training.


def test_damaged_shard_is_named_with_its_problem(path: Path, tmp_path: Path) -> None:
    shards = write_shards(str(path), tmp_path / "mds")
    shard = tmp_path / "mds/train/shard.00001.mds"
    content = bytearray(shard.read_bytes())
    content[2000:2020] = bytes(20)
    shard.write_bytes(content)
    tally = tally_of(DataSource(shards, "train", ade20k(Labels(12)), ShardOptions()).chunks())
    (finding,) = tally.findings
    assert finding.path == str(shard) and finding.fatal
    assert "hash does not match the index" in finding.reason


def test_pair_that_cannot_be_read_is_an_error(path: Path) -> None:
    image, mask = sample(path, 1)
    pair = DataSource(str(path), "train", ade20k(Labels(12))).samples()[0]
    assert read_pair(pair, None)[3].tolist() == labels_of(mask).tolist()
    cut(image, 0.5)
    with pytest.raises(DataError, match=f"{image}: "):
        read_pair(pair, None)
    mask.unlink()
    with pytest.raises(DataError, match=f"{mask}: "):
        read_pair(pair, None)
