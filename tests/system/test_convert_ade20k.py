"""convert_ade20k.py writes shards to S3 and resumes; the check finds damaged objects."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import StreamingADE20k
from dataset.description import ade20k
from dataset.labels import Labels
from dataset.matching import list_samples
from dataset.source import DataSource, ShardOptions
from errors import DataError
from extras.preparation.verify import check
from tests.support.convert_ade20k import check_shards, files, out, path, server, write  # noqa: F401
from tests.support.s3_server import BUCKET
from tests.support.waits import no_waiting  # noqa: F401


def objects(server, prefix: str) -> dict[str, bytes]:
    entries = server.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    keys = [entry["Key"] for entry in entries]
    read = server.client.get_object
    return {key: read(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}


def test_shards_on_s3_equal_local_shards(server, synthetic, tmp_path, out):
    staging = tmp_path / "staging"
    url = f"s3://{BUCKET}/good"
    assert write(synthetic, url + "/", staging=str(staging)) == {"train": 16, "val": 6}
    assert not staging.exists()
    write(synthetic, out)
    expected = {f"good/{name}": content for name, content in files(out).items()}
    assert objects(server, "good") == expected
    cache = tmp_path / "cache"
    check_shards(synthetic, StreamingADE20k(url, str(cache), "train"), "train")
    assert write(synthetic, url, staging=str(staging)) == {
        "train": 16,
        "val": 6,
    }  # existing shards are only verified
    with pytest.raises(DataError, match=r"no-bucket.*404"):
        write(synthetic, "s3://no-bucket/set", staging=str(staging))


def test_resumed_conversion_does_not_rewrite_uploaded_shards(server, path, tmp_path, monkeypatch):
    staging = tmp_path / "staging"
    image = Path(list_samples(str(path), "train")[-1].image_path)
    content = image.read_bytes()
    image.write_bytes(b"not an image")
    url = f"s3://{BUCKET}/resumed"
    with pytest.raises(DataError, match="unknown image format"):
        write(path, url, staging=str(staging))
    before = {
        entry["Key"]: entry["LastModified"]
        for entry in server.client.list_objects_v2(Bucket=BUCKET, Prefix="resumed")["Contents"]
    }
    assert before and not any(key.endswith("index.json") for key in before)
    image.write_bytes(content)
    write(path, url, staging=str(staging))
    after = server.client.list_objects_v2(Bucket=BUCKET, Prefix="resumed")["Contents"]
    after = {entry["Key"]: entry["LastModified"] for entry in after}
    assert {key: after[key] for key in before} == before
    check_shards(path, StreamingADE20k(url, str(tmp_path / "cache"), "train"), "train")


def test_check_reports_path_of_damaged_shard_on_s3(server, synthetic, tmp_path):
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
