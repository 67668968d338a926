"""Tests of convert_ade20k.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import streaming
from PIL import Image
from streaming.base.compression import decompress

import convert_ade20k as converter
from convert_ade20k import main
from data import StreamingADE20k
from dataset.matching import list_samples
from errors import DataError
from tests.support.convert_ade20k import check_shards, files, out, path, write  # noqa: F401
from tests.support.run_helpers import file_limit
from tests.support.waits import no_waiting  # noqa: F401

ROOT = "ADEChallengeData2016"


def test_written_shards_contain_the_original_files(synthetic, out):
    assert write(synthetic, out) == {"train": 16, "val": 6}
    for split in ("train", "val"):
        check_shards(synthetic, StreamingADE20k(None, str(out), split), split)
    assert sorted(os.listdir(out)) == ["train", "val"]  # notes, locks and temporary files are gone
    index = json.loads((out / "val/index.json").read_text())
    names = {entry["raw_data"]["basename"] for entry in index["shards"]}
    assert {*os.listdir(out / "val")} >= {"index.json", "shard.00000.mds", "shard.00001.mds"}
    assert {name for name in os.listdir(out / "val") if name.endswith(".mds")} == names


def test_unmodified_streaming_library_reads_the_shards(synthetic, out):
    """Streaming's reader finds the same columns as in shards of Streaming's converter."""
    write(synthetic, out)
    samples = list_samples(synthetic, "val")
    shards = streaming.StreamingDataset(
        local=str(out), split="val", shuffle=False, batch_size=1, validate_hash="xxh64"
    )
    assert len(shards) == 6
    for sample, row in zip(samples, shards):
        assert sorted(row) == ["uid", "x", "y"] and row["uid"] == sample.uid.encode()
        assert (row["x"].format, row["y"].format) == ("JPEG", "PNG")
        assert np.array_equal(row["x"], Image.open(sample.image_path))
        assert np.array_equal(row["y"], Image.open(sample.mask_path))
    shard = shards.shards[0]
    assert (shard.column_names, shard.column_encodings) == (
        ["uid", "x", "y"],
        ["bytes", "jpeg", "png"],
    )
    assert shard.hashes == ["sha1", "xxh64"]


def test_compression_and_hashes_are_applied(synthetic, out):
    write(synthetic, out, compression="zstd:3", hashes=("md5",))
    index = json.loads((out / "train/index.json").read_text())
    for entry in index["shards"]:
        assert list(entry["zip_data"]["hashes"]) == ["md5"]
        data = (out / "train" / entry["zip_data"]["basename"]).read_bytes()
        assert len(decompress("zstd", data)) == entry["raw_data"]["bytes"]
    assert not list((out / "train").glob("*.mds"))
    check_shards(synthetic, StreamingADE20k(None, str(out), "train"), "train")


def test_second_run_only_verifies_and_writes_no_file(path, out, caplog):
    write(path, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    caplog.set_level("INFO")
    assert write(path, out) == {"train": 16, "val": 6}
    assert "complete and verified" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file != out} == {
        file: time for file, time in before.items() if file != out
    }


def test_shards_of_another_dataset_are_not_overwritten(path, out):
    write(path, out)
    before = files(out)
    mask = Path(list_samples(str(path), "train")[5].mask_path)
    Image.fromarray(255 - np.array(Image.open(mask))).save(mask)
    with pytest.raises(
        DataError, match=r"contains a different data set .sample 00000006 .*; delete it"
    ):
        write(path, out)
    Path(list_samples(str(path), "train")[5].image_path).unlink()
    mask.unlink()
    with pytest.raises(DataError, match="it has 16 samples instead of 15"):
        write(path, out)
    assert files(out) == before


def test_failed_fork_is_not_reported_as_another_conversion(path, out, monkeypatch):
    def fail(*_):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fail)
    with pytest.raises(BlockingIOError):
        write(path, out)


def test_shards_written_with_other_options_are_rejected(path, out):
    write(path, out)
    with pytest.raises(DataError, match="it has compression None and hashes"):
        write(path, out, compression="zstd")


def test_shard_is_rewritten_if_its_files_have_changed(path, out):
    images = [Path(sample.image_path) for sample in list_samples(str(path), "train")]
    last = images[-1].read_bytes()
    images[-1].write_bytes(b"not an image")
    with pytest.raises(DataError, match=f"{images[-1]}: unknown image format"):
        write(path, out)
    assert list((out / "train").glob("*.mds"))
    images[-1].write_bytes(last)
    shutil.copy(images[1], images[0])
    write(path, out)
    check_shards(path, StreamingADE20k(None, str(out), "train"), "train")


def test_bad_files_and_options_give_a_one_line_error(path, out, capsys):
    def error(*arguments: str) -> str:
        command = ["--path", str(path), "--out", str(out), *arguments]
        assert main(command) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "compression: Streaming does not support 'rar'" in error("--compression", "rar")
    assert "hash: Streaming does not support 'crc'" in error("--hashes", "crc")
    assert "size limit: 'much' is not a number" in error("--size-limit", "much")
    assert "folder is missing" in error("--path", str(path / "none"))
    mask = Path(list_samples(str(path), "val")[2].mask_path)
    Image.fromarray(np.ones((4, 4), np.uint8)).save(mask)
    assert f"{mask.stem}.jpg: " in error() and not (out / "val/index.json").exists()
    with converter._only_one(str(out)):
        assert "another conversion" in error()
    mask.unlink()
    assert "its mask is missing" in error()


def test_dataset_without_a_validation_split_is_converted(path, out):
    shutil.rmtree(path / ROOT / "images/validation")
    assert write(path, out) == {"train": 16}


def test_full_disk_gives_a_one_line_error(path, out, capsys):
    with file_limit(2000):
        arguments = ["--path", str(path), "--out", str(out), "--workers", "1"]
        assert main(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error[-1].startswith(f"error: {out}/train/shard.00000.mds: File too large")
    assert list(out.rglob("*.mds")) == [] and not (out / "train/index.json").exists()
    assert main(arguments) == 0


def test_input_description_is_not_overwritten(tmp_path, capsys):
    """The description beside the new shards would otherwise replace the input description."""
    file = tmp_path / "description.yaml"
    text = "root: .\ntrain: {images: a, masks: b}\nval: {fraction: 0.2}\n"
    file.write_text(text + "classes: {x: {labels: [1]}, y: {labels: [2]}}\nignore: [0]\n")
    for folder in "ab":
        (tmp_path / folder).mkdir()
        for number in range(10):
            suffix = "jpg" if folder == "a" else "png"
            cv2.imwrite(f"{tmp_path}/{folder}/{number}.{suffix}", np.ones((32, 32), np.uint8))
    before = file.read_bytes()
    assert main(["--path", str(file), "--out", str(tmp_path)]) == 1
    assert f"{file} would be overwritten, but it is an input" in capsys.readouterr().err
    assert file.read_bytes() == before
