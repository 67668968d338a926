"""convert_ade20k.py: shards that Streaming reads and that equal the files, whatever happened."""

from __future__ import annotations

from tests.support.convert_ade20k import path, server, write  # noqa: F401
from tests.support.s3_server import BUCKET
from tests.support.waits import no_waiting  # noqa: F401


def test_a_staging_folder_keeps_what_else_it_holds(server, path, tmp_path):
    staging = tmp_path / "staging"
    (staging / "train").mkdir(parents=True)
    for name in ("notes.txt", "train/notes.txt"):
        (staging / name).write_text("mine")
    write(path, f"s3://{BUCKET}/staged", staging=str(staging))
    left = sorted(str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file())
    assert left == ["notes.txt", "train/notes.txt"]
