"""convert_ade20k.py writes the same shards with any number of workers and after interruptions."""

from __future__ import annotations

import os
import signal

from convert_ade20k import main
from tests.support.convert_ade20k import check_shards, files, out, path, server, write  # noqa: F401
from tests.support.s3_server import BUCKET
from tests.support.waits import no_waiting  # noqa: F401


def test_conversion_keeps_unrelated_files_in_staging_folder(server, path, tmp_path):
    staging = tmp_path / "staging"
    (staging / "train").mkdir(parents=True)
    for name in ("notes.txt", "train/notes.txt"):
        (staging / name).write_text("mine")
    write(path, f"s3://{BUCKET}/staged", staging=str(staging))
    remaining_files = sorted(
        str(file.relative_to(staging)) for file in staging.rglob("*") if file.is_file()
    )
    assert remaining_files == ["notes.txt", "train/notes.txt"]


def test_shards_are_equal_for_any_number_of_workers(synthetic, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write(synthetic, tmp_path / name, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_interrupted_conversion_continues_when_run_again(path, out, monkeypatch, capsys):
    """Finished shards are not rewritten, and the result equals that without interruption."""
    write(path, out.with_name("expected"))
    counts = []

    def interrupt(bar, count):
        counts.append(count)
        if sum(counts) >= 8:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("dataset.workers.tqdm.update", interrupt)
    arguments = ["--path", str(path), "--out", str(out), "--size-limit", "10kb", "--workers", "1"]
    assert main(arguments) == 130
    assert "run the command again" in capsys.readouterr().err
    monkeypatch.undo()
    finished_shards = {file: file.stat().st_mtime_ns for file in (out / "train").glob("*.mds")}
    assert finished_shards and not (out / "train/index.json").exists()
    assert main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in finished_shards} == finished_shards
    assert files(out) == files(out.with_name("expected"))
