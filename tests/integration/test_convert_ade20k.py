"""convert_ade20k.py: shards that Streaming reads and that equal the files, whatever happened."""

from __future__ import annotations

import os
import signal

from convert_ade20k import main
from tests.support.convert_ade20k import check_shards, files, out, path, server, write  # noqa: F401
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


def test_output_depends_on_nothing_but_the_input(synthetic, tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write(synthetic, tmp_path / name, workers=workers)
    assert files(tmp_path / "one") == files(tmp_path / "two")


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
    assert "run the command again" in capsys.readouterr().err
    monkeypatch.undo()
    done = {file: file.stat().st_mtime_ns for file in (out / "train").glob("*.mds")}
    assert done and not (out / "train/index.json").exists()
    assert main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert files(out) == files(out.with_name("expected"))
