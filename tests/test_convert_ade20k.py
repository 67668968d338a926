"""convert_ade20k.py: shards that Streaming reads and that equal the files, whatever happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
import streaming
from PIL import Image
from run_helpers import file_limit
from streaming.base.compression import decompress

import convert_ade20k as converter
from benchmarks.s3_server import BUCKET, s3_server
from convert_ade20k import convert, main
from data import StreamingADE20k
from dataset.description import ade20k
from dataset.labels import Labels
from dataset.matching import list_samples
from dataset.source import DataSource, ShardOptions
from errors import DataError
from extras.preparation import shard_writer
from extras.preparation.shard_writer import plan_shards
from extras.preparation.verify import check

pytestmark = pytest.mark.processes

ROOT = "ADEChallengeData2016"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "shards"


@pytest.fixture
def path(synthetic, tmp_path) -> Path:
    """A copy of the data set that a test may change."""
    return Path(shutil.copytree(synthetic, tmp_path / "set"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("dataset.shards.time.sleep", lambda seconds: None)  # between attempts


def write(path: Path | str, out: Path | str, **options) -> dict[str, int]:
    """A few shards a split, in this process's children."""
    return convert(str(path), str(out), **{"size_limit": "10kb", "workers": 1, **options})


def files(folder: Path) -> dict[str, bytes]:
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


def check_shards(path: Path | str, shards: StreamingADE20k, split: str) -> None:
    """Every sample, in order, as its files are."""
    samples = list_samples(str(path), split)
    assert len(shards) == len(samples)
    for index, sample in enumerate(samples):
        uid, photo, mask, _ = shards.read(index)
        assert uid == sample.uid
        assert photo == Path(sample.image_path).read_bytes()
        assert mask == Path(sample.mask_path).read_bytes()


def test_streaming_reads_the_files(synthetic, out):
    assert write(synthetic, out) == {"train": 16, "val": 6}
    for split in ("train", "val"):
        check_shards(synthetic, StreamingADE20k(None, str(out), split), split)
    assert sorted(os.listdir(out)) == ["train", "val"]  # no notes, locks or temporary files
    index = json.loads((out / "val/index.json").read_text())
    names = {entry["raw_data"]["basename"] for entry in index["shards"]}
    assert {*os.listdir(out / "val")} >= {"index.json", "shard.00000.mds", "shard.00001.mds"}
    assert {name for name in os.listdir(out / "val") if name.endswith(".mds")} == names


def test_stock_streaming_reads_pictures(synthetic, out):
    """With the columns of Streaming's own converter, and Streaming's own reader."""
    write(synthetic, out)
    samples = list_samples(synthetic, "val")
    shards = streaming.StreamingDataset(
        local=str(out), split="val", shuffle=False, batch_size=1, validate_hash="xxh64"
    )
    assert len(shards) == 6
    for sample, found in zip(samples, shards):
        assert sorted(found) == ["uid", "x", "y"] and found["uid"] == sample.uid.encode()
        assert (found["x"].format, found["y"].format) == ("JPEG", "PNG")
        assert np.array_equal(found["x"], Image.open(sample.image_path))
        assert np.array_equal(found["y"], Image.open(sample.mask_path))
    shard = shards.shards[0]
    assert (shard.column_names, shard.column_encodings) == (
        ["uid", "x", "y"],
        ["bytes", "jpeg", "png"],
    )
    assert shard.hashes == ["sha1", "xxh64"]


def test_output_depends_on_nothing_but_the_input(synthetic, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write(synthetic, tmp_path / name, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_compression_and_hashes(synthetic, out):
    write(synthetic, out, compression="zstd:3", hashes=("md5",))
    index = json.loads((out / "train/index.json").read_text())
    for entry in index["shards"]:
        assert list(entry["zip_data"]["hashes"]) == ["md5"]
        data = (out / "train" / entry["zip_data"]["basename"]).read_bytes()
        assert len(decompress("zstd", data)) == entry["raw_data"]["bytes"]
    assert not list((out / "train").glob("*.mds"))
    check_shards(synthetic, StreamingADE20k(None, str(out), "train"), "train")


def test_shards_are_filled_to_the_limit(synthetic, out):
    samples = list_samples(synthetic, "train")
    shards = plan_shards(samples, 10_240)
    assert [sample for shard in shards for sample in shard] == samples
    write(synthetic, out)
    sizes = [file.stat().st_size for file in sorted((out / "train").glob("*.mds"))]
    assert len(sizes) == len(shards)
    largest = max(os.stat(s.image_path).st_size + os.stat(s.mask_path).st_size for s in samples)
    assert all(10_240 - largest - 500 < size < 10_240 + 500 for size in sizes[:-1])
    assert [len(shard) for shard in plan_shards(samples, 1)] == [1] * 16  # larger than the limit


def test_running_again_verifies_and_writes_nothing(path, out, caplog):
    write(path, out)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    caplog.set_level("INFO")
    assert write(path, out) == {"train": 16, "val": 6}
    assert "complete and verified" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*") if file != out} == {
        file: time for file, time in before.items() if file != out
    }


def test_does_not_write_over_another_data_set(path, out):
    write(path, out)
    before = files(out)
    mask = Path(list_samples(str(path), "train")[5].mask_path)
    Image.fromarray(255 - np.array(Image.open(mask))).save(mask)
    with pytest.raises(DataError, match=r"another one .sample 00000006 .*: delete it, or use"):
        write(path, out)
    Path(list_samples(str(path), "train")[5].image_path).unlink()
    mask.unlink()
    with pytest.raises(DataError, match="it has 16 samples, not 15"):
        write(path, out)
    assert files(out) == before


def test_does_not_take_other_options_for_done(path, out):
    write(path, out)
    with pytest.raises(DataError, match="it has compression None and hashes"):
        write(path, out, compression="zstd")


def test_goes_on_after_an_interruption(path, out, monkeypatch, capsys):
    """Finished shards are not written again; what comes out is as if nothing had happened."""
    write(path, out.with_name("expected"))
    counts = []

    def interrupt(bar, count):
        counts.append(count)
        if sum(counts) >= 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dataset.workers.tqdm.update", interrupt)
    arguments = ["--path", str(path), "--out", str(out), "--size-limit", "10kb", "--workers", "1"]
    assert main(arguments) == 130
    assert "run again" in capsys.readouterr().err
    monkeypatch.undo()
    done = {file: file.stat().st_mtime_ns for file in (out / "train").glob("*.mds")}
    assert done and not (out / "train/index.json").exists()
    assert main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert files(out) == files(out.with_name("expected"))


def test_a_shard_whose_files_changed_meanwhile_is_written_again(path, out):
    photos = [Path(sample.image_path) for sample in list_samples(str(path), "train")]
    last = photos[-1].read_bytes()
    photos[-1].write_bytes(b"not a photo")
    with pytest.raises(DataError, match=f"{photos[-1]}: not an image"):
        write(path, out)
    assert list((out / "train").glob("*.mds"))
    photos[-1].write_bytes(last)
    shutil.copy(photos[1], photos[0])
    write(path, out)
    check_shards(path, StreamingADE20k(None, str(out), "train"), "train")


def test_files_of_an_interrupted_run_with_other_options_are_removed(path, out, monkeypatch):
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


def test_what_a_bad_disk_did_is_found_and_repaired_by_the_next_run(path, out, monkeypatch):
    """A shard that is not what was written fails the verification, and no index is written."""
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
        DataError, match=r"train/shard\.00001\.mds: .*Checksum failure.*.and 1 more"
    ):
        write(path, out)
    assert not (out / "train/index.json").exists()
    monkeypatch.undo()
    write(path, out)
    check_shards(path, StreamingADE20k(None, str(out), "train"), "train")


def test_one_line_for_bad_files_and_options(path, out, capsys):
    def error(*arguments: str) -> str:
        command = ["--path", str(path), "--out", str(out), *arguments]
        assert main(command) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    assert "compression 'rar' is none" in error("--compression", "rar")
    assert "hash 'crc' is none" in error("--hashes", "crc")
    assert "size limit 'much' is no number" in error("--size-limit", "much")
    assert "folder is missing" in error("--path", str(path / "none"))
    mask = Path(list_samples(str(path), "val")[2].mask_path)
    Image.fromarray(np.ones((4, 4), np.uint8)).save(mask)
    assert f"{mask.stem}.jpg: " in error() and not (out / "val/index.json").exists()
    with converter._only_one(str(out)):
        assert "another conversion" in error()
    mask.unlink()
    assert "its mask is missing" in error()


def test_a_data_set_without_validation(path, out):
    shutil.rmtree(path / ROOT / "images/validation")
    assert write(path, out) == {"train": 16}


@pytest.fixture(scope="module")
def server():
    with s3_server() as server:
        yield server


def objects(server, prefix: str) -> dict[str, bytes]:
    found = server.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    keys = [entry["Key"] for entry in found]
    read = server.client.get_object
    return {key: read(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_writes_to_s3_and_is_read_and_checked_from_there(server, synthetic, tmp_path, out):
    staging = tmp_path / "staging"
    url = f"s3://{BUCKET}/good"
    assert write(synthetic, url + "/", staging=str(staging)) == {"train": 16, "val": 6}
    assert not staging.exists()
    write(synthetic, out)
    expected = {f"good/{name}": content for name, content in files(out).items()}
    assert objects(server, "good") == expected
    cache = tmp_path / "cache"
    check_shards(synthetic, StreamingADE20k(url, str(cache), "train"), "train")
    assert write(synthetic, url, staging=str(staging)) == {"train": 16, "val": 6}  # and again
    with pytest.raises(DataError, match=r"no-bucket.*404"):
        write(synthetic, "s3://no-bucket/set", staging=str(staging))


def test_goes_on_after_an_upload_that_failed(server, path, tmp_path, monkeypatch):
    staging = tmp_path / "staging"
    photo = Path(list_samples(str(path), "train")[-1].image_path)
    content = photo.read_bytes()
    photo.write_bytes(b"not a photo")
    url = f"s3://{BUCKET}/resumed"
    with pytest.raises(DataError, match="not an image"):
        write(path, url, staging=str(staging))
    before = {
        entry["Key"]: entry["LastModified"]
        for entry in server.client.list_objects_v2(Bucket=BUCKET, Prefix="resumed")["Contents"]
    }
    assert before and not any(key.endswith("index.json") for key in before)
    photo.write_bytes(content)
    write(path, url, staging=str(staging))
    after = server.client.list_objects_v2(Bucket=BUCKET, Prefix="resumed")["Contents"]
    after = {entry["Key"]: entry["LastModified"] for entry in after}
    assert {key: after[key] for key in before} == before
    check_shards(path, StreamingADE20k(url, str(tmp_path / "cache"), "train"), "train")


def test_validation_names_a_damaged_object(server, synthetic, tmp_path):
    url = f"s3://{BUCKET}/damaged"
    write(synthetic, url)
    key = "damaged/train/shard.00001.mds"
    body = bytearray(objects(server, key)[key])
    body[200] ^= 255
    server.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(body))
    shards = ShardOptions(str(tmp_path / "cache"))
    tallies = check(DataSource(url, "train", ade20k(Labels(12)), shards), workers=2)
    (finding,) = tallies["train"].findings
    assert finding.path == f"s3://{key.replace('damaged', f'{BUCKET}/damaged', 1)}"
    assert "Checksum failure" in finding.reason and finding.fatal
    assert tallies["val"].findings == [] and len(tallies["val"].sizes) == 6


def test_files_of_others_stay(path, out, monkeypatch):
    """Shards without a note are of another program, and a folder is not ours for its name."""
    (out / "train").mkdir(parents=True)
    shard = out / "train/shard.00000.mds"
    shard.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"train/shard\.00000\.mds is there already, and no"):
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


def test_a_staging_folder_keeps_what_else_it_holds(server, path, tmp_path):
    staging = tmp_path / "staging"
    (staging / "train").mkdir(parents=True)
    for name in ("notes.txt", "train/notes.txt"):
        (staging / name).write_text("mine")
    write(path, f"s3://{BUCKET}/staged", staging=str(staging))
    left = sorted(str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file())
    assert left == ["notes.txt", "train/notes.txt"]


def test_a_full_disk_is_one_line(path, out, capsys):
    with file_limit(2000):
        arguments = ["--path", str(path), "--out", str(out), "--workers", "1"]
        assert main(arguments) == 1
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert error[-1].startswith(f"error: {out}/train/shard.00000.mds: File too large")
    assert list(out.rglob("*.mds")) == [] and not (out / "train/index.json").exists()
    assert main(arguments) == 0


def test_the_description_is_not_overwritten(tmp_path, capsys):
    """Its name beside the shards is that of an input here."""
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
    assert f"{file} would be overwritten" in capsys.readouterr().err
    assert file.read_bytes() == before
