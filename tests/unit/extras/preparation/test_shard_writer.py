"""Tests of extras/preparation/shard_writer.py."""

from __future__ import annotations

import json
import os

import pytest

from data import StreamingADE20k
from dataset.matching import list_samples
from errors import DataError
from extras.preparation import shard_writer
from extras.preparation.shard_writer import plan_shards
from tests.support.convert_ade20k import check_shards, out, path, write  # noqa: F401
from tests.support.waits import no_waiting  # noqa: F401


def test_shards_are_filled_to_the_size_limit(synthetic, out):
    samples = list_samples(synthetic, "train")
    shards = plan_shards(samples, 10_240)
    assert [sample for shard in shards for sample in shard] == samples
    write(synthetic, out)
    sizes = [file.stat().st_size for file in sorted((out / "train").glob("*.mds"))]
    assert len(sizes) == len(shards)
    largest = max(os.stat(s.image_path).st_size + os.stat(s.mask_path).st_size for s in samples)
    assert all(10_240 - largest - 500 < size < 10_240 + 500 for size in sizes[:-1])
    # Each sample exceeds the size limit.
    assert [len(shard) for shard in plan_shards(samples, 1)] == [1] * 16


def test_shards_of_an_interrupted_run_are_removed(path, out, monkeypatch):
    def fail(*arguments):
        raise DataError("interrupted here")

    monkeypatch.setattr(shard_writer, "_verify", fail)
    with pytest.raises(DataError, match="interrupted here"):
        write(path, out, size_limit="5kb")
    count = len(list((out / "train").glob("*.mds")))
    monkeypatch.undo()
    write(path, out, size_limit="20kb")
    index = json.loads((out / "train/index.json").read_text())
    assert len(index["shards"]) == len(list((out / "train").glob("*.mds"))) < count


def test_damaged_shards_are_detected_and_rewritten(path, out, monkeypatch):
    """A damaged shard fails the verification, so the converter writes no index."""
    write_shards = shard_writer._write_shards

    def write_and_damage(*arguments):
        entries = write_shards(*arguments)
        shard = out / "train/shard.00001.mds"
        content = bytearray(shard.read_bytes())
        content[-50] ^= 1
        shard.write_bytes(content)
        (out / "train/shard.00002.mds").unlink()
        return entries

    monkeypatch.setattr(shard_writer, "_write_shards", write_and_damage)
    with pytest.raises(
        DataError, match=r"train/shard\.00001\.mds: .*Checksum failure.*\(2 of 4 shards"
    ):
        write(path, out)
    assert not (out / "train/index.json").exists()
    monkeypatch.undo()
    write(path, out)
    check_shards(path, StreamingADE20k(None, str(out), "train"), "train")


def test_converter_keeps_files_of_other_programs(path, out, monkeypatch):
    """Shards without the converter's note, and unknown files, belong to another program."""
    (out / "train").mkdir(parents=True)
    shard = out / "train/shard.00000.mds"
    shard.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"train/shard\.00000\.mds already exists and was not"):
        write(path, out)
    assert shard.read_bytes() == b"mine"
    shard.unlink()
    (out / "train/shards.txt").write_text("mine")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shard_writer, "_verify", interrupt)
        write(path, out, size_limit="5kb")
    (out / "train/.finished/notes.txt").write_text("mine")
    write(path, out, size_limit="20kb")
    assert (out / "train/.finished/notes.txt").read_text() == "mine"
    assert (out / "train/shards.txt").read_text() == "mine"
    index = json.loads((out / "train/index.json").read_text())
    assert len(index["shards"]) == len(list((out / "train").glob("*.mds")))
