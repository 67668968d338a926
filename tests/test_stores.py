"""Folders and object stores of checkpoints: each is whole or not there, and the rest goes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import save_whole

from benchmarks.s3_server import S3Server, s3_server
from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import LocalFolder, checkpoint_in, outdated
from errors import ConfigError, RunError, WeightsError
from main import main

pytestmark = [pytest.mark.trains, pytest.mark.usefixtures("small_network")]


NAMES = [f"ep0-ba{batch}-rank0.pt" for batch in (12, 10, 8, 6, 4)]


@pytest.mark.parametrize(
    ("newest", "keep", "best", "own", "removed"),
    [
        pytest.param(0, 2, None, NAMES, NAMES[2:], id="old ones"),
        pytest.param(0, -1, None, NAMES, [], id="all are kept"),
        pytest.param(2, 2, None, NAMES, NAMES[4:], id="later ones stay: they were damaged"),
        pytest.param(0, 1, NAMES[3], NAMES, [NAMES[1], NAMES[2], NAMES[4]], id="the best stays"),
        pytest.param(0, 1, None, [NAMES[0], NAMES[3]], [NAMES[3]], id="another run's stay"),
        pytest.param(0, 2, None, [NAMES[0], NAMES[3]], [], id="another run's do not count"),
    ],
)
def test_pruning_removes_only_old_checkpoints_of_the_run(
    newest: int, keep: int, best: str | None, own: list[str], removed: list[str]
) -> None:
    assert outdated(NAMES, NAMES[newest], keep, best, own) == removed


def test_a_new_checkpoint_is_whole_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = save_whole(tmp_path, 2)
    target, link = LocalFolder(str(tmp_path)), tmp_path / "latest-rank0.pt"
    (tmp_path / "new").write_bytes(b"new")
    seen = []
    replace, remove, sync = os.replace, os.remove, os.fsync

    def look(function: Any) -> Any:
        def looking(*arguments: Any) -> None:
            assert old.exists()
            seen.append((function.__name__, os.readlink(link)))
            function(*arguments)

        return looking

    for name, function in {"replace": replace, "remove": remove, "fsync": sync}.items():
        monkeypatch.setattr(os, name, look(function))
    target.publish(
        str(tmp_path / "new"),
        "ep0-ba4-rank0.pt",
        keep=1,
        own=["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"],
    )
    assert seen == [
        ("replace", "ep0-ba2-rank0.pt"),
        ("fsync", "ep0-ba2-rank0.pt"),
        ("remove", "ep0-ba2-rank0.pt"),  # a link that a killed run may have left
        ("replace", "ep0-ba2-rank0.pt"),
        ("fsync", "ep0-ba4-rank0.pt"),
        ("remove", "ep0-ba4-rank0.pt"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["ep0-ba4-rank0.pt", "latest-rank0.pt"]
    assert link.read_bytes() == b"new"


def test_the_best_stays_while_old_ones_go(tmp_path: Path) -> None:
    target, link = LocalFolder(str(tmp_path)), tmp_path / "best-rank0.pt"

    def publish(batch: int, best: int | None) -> list[str]:
        (tmp_path / "new").write_bytes(str(batch).encode())
        names = [f"ep0-ba{number}-rank0.pt" if number else None for number in (batch, best)]
        own = [path.name for path in tmp_path.glob("ep*.pt")]
        target.publish(str(tmp_path / "new"), str(names[0]), 1, names[1], [*own, str(names[0])])
        return [path.name for path in sorted(tmp_path.glob("ep*.pt"))]

    assert publish(2, None) == ["ep0-ba2-rank0.pt"]
    assert not link.exists()
    assert publish(4, 4) == ["ep0-ba4-rank0.pt"]
    assert publish(6, 4) == ["ep0-ba4-rank0.pt", "ep0-ba6-rank0.pt"]
    assert publish(8, 4) == ["ep0-ba4-rank0.pt", "ep0-ba8-rank0.pt"]
    assert link.read_bytes() == b"4"
    assert checkpoint_in(tmp_path) == str(link)
    assert publish(9, 9) == ["ep0-ba9-rank0.pt"]
    assert link.read_bytes() == b"9"
    target.point_best(None)
    assert not link.is_symlink()
    assert checkpoint_in(tmp_path) == str(tmp_path / "latest-rank0.pt")
    (tmp_path / "latest-rank0.pt").unlink()
    assert checkpoint_in(tmp_path) == str(tmp_path / "ep0-ba9-rank0.pt")
    (tmp_path / "ep0-ba9-rank0.pt").unlink()
    with pytest.raises(WeightsError, match=r"a folder without checkpoints"):
        checkpoint_in(tmp_path)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_a_run_in_an_object_store(tiny: dict[str, Any], server: S3Server, tmp_path: Path) -> None:
    tiny |= {"save_folder": "s3://data/runs/{run_name}", "autoresume": True}
    tiny |= {"save_interval": "1ba", "eval_interval": "100ep", "save_num_checkpoints_to_keep": 2}
    main({**tiny, "max_duration": "3ba"})
    store = RemoteFolder("s3://data/runs/tiny")
    assert store.names()[0] == "ep0-ba3-rank0.pt"
    assert len(store.names()) == 2
    assert store.latest() == "ep0-ba3-rank0.pt"

    # A machine that has none of it goes on; the newest is damaged.
    body = store.store.client.get_object(Bucket="data", Key="runs/tiny/ep0-ba3-rank0.pt")["Body"]
    half = body.read()[:100_000]
    store.store.client.put_object(Bucket="data", Key="runs/tiny/ep0-ba3-rank0.pt", Body=half)
    trainer = main({**tiny, "max_duration": "4ba"})
    assert len(trainer.state.callbacks[-1].saved_checkpoints) == 2
    assert store.names() == ["ep0-ba4-rank0.pt", "ep0-ba3-rank0.pt"]

    # Its weights begin another run; another machine's, by what points at them.
    for name in ("ep0-ba4-rank0.pt", "latest-rank0.pt"):
        begun = {**tiny, "autoresume": False, "save_folder": None, "max_duration": "5ba"}
        trainer = main({**begun, "load_path": f"s3://data/runs/tiny/{name}"})
        assert trainer.state.timestamp.batch == 5
    model = {"num_classes": 13, "backbone_arch": "resnet50", "backbone_weights": None}
    with pytest.raises(ConfigError, match=r"model.num_classes: 13, but s3:.* was trained with 12"):
        main({**begun, "load_path": "s3://data/runs/tiny/latest-rank0.pt", "model": model})
    with pytest.raises(ConfigError, match=r"load_path: cannot read s3://data/nothing.pt"):
        main({**begun, "load_path": "s3://data/nothing.pt"})


def test_a_store_that_is_away_while_a_checkpoint_is_uploaded(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = RemoteFolder("s3://data/outage")
    target.probe()
    paths = [tmp_path / f"{batch}" for batch in (2, 4, 6)]
    for path in paths:
        path.write_bytes(os.urandom(1 << 20))
    content = paths[2].read_bytes()
    server.kill()
    target.publish(str(paths[0]), "ep0-ba2-rank0.pt", keep=1)
    deadline, refused = time.monotonic() + 60, "cannot upload s3://data/outage/ep0-ba2-rank0.pt"
    while refused not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    assert refused in caplog.text
    target.publish(str(paths[1]), "ep0-ba4-rank0.pt", keep=1)
    target.publish(str(paths[2]), "ep0-ba6-rank0.pt", keep=1)
    assert not target.wait(0)
    server.start()
    assert target.wait(60)
    assert target.names()[0] == "ep0-ba6-rank0.pt"
    assert target.latest() == "ep0-ba6-rank0.pt"
    (tmp_path / "back").mkdir()
    assert Path(target.fetch("ep0-ba6-rank0.pt", f"{tmp_path}/back")).read_bytes() == content
    assert not any(path.exists() for path in paths)


def test_the_best_is_uploaded_although_newer_ones_wait(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = RemoteFolder("s3://data/best")

    def publish(batch: int, best: int) -> None:
        (tmp_path / "new").write_bytes(str(batch).encode())
        names = [f"ep0-ba{number}-rank0.pt" for number in (batch, best)]
        own = [f"ep0-ba{number}-rank0.pt" for number in range(batch + 1)]
        target.publish(str(tmp_path / "new"), names[0], 1, names[1], own)

    server.kill()
    publish(2, 2)
    deadline = time.monotonic() + 60
    while "cannot upload" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.1)
    publish(2, 2)  # once more, with what its evaluation says
    for batch, best in ((4, 2), (5, 5), (6, 5), (7, 5)):
        publish(batch, best)
    assert [item.name for item in target._waiting] == ["ep0-ba5-rank0.pt", "ep0-ba7-rank0.pt"]
    server.start()
    assert target.wait(60)
    assert target.names() == ["ep0-ba7-rank0.pt", "ep0-ba5-rank0.pt"]

    def pointer() -> str | None:
        keys = target.store.list_objects("best/best-rank0.pt.symlink")
        if not keys:
            return None
        body = target.store.client.get_object(Bucket="data", Key=keys[0])["Body"]
        return body.read().decode()

    assert pointer() == "best/ep0-ba5-rank0.pt"
    target.point_best("ep0-ba7-rank0.pt")
    assert pointer() == "best/ep0-ba7-rank0.pt"
    target.point_best(None)
    assert pointer() is None
    assert os.listdir(target.scratch).count("new") == 0


def test_an_upload_that_is_given_up_ends_the_run(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpointing.remote_store.UPLOAD_FOR", 0)
    target = RemoteFolder("s3://no-such-bucket/runs")
    (tmp_path / "file").write_bytes(b"checkpoint")
    target.publish(str(tmp_path / "file"), "ep0-ba2-rank0.pt", keep=1)
    with pytest.raises(RunError, match=r"NoSuchBucket.* it is still at ") as caught:
        target.wait(60)
    kept = Path(str(caught.value).rpartition(" ")[2])
    del target  # and its scratch folder
    assert kept.read_bytes() == b"checkpoint"


def test_a_store_that_cannot_be_written_is_found_first(
    tiny: dict[str, Any], server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"cannot write to s3://no-such-bucket/x: .*NoSuchBucket"):
        main({**tiny, "save_folder": "s3://no-such-bucket/x"})
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        with pytest.raises(ConfigError, match=r"cannot write to s3://data/x: .*SignatureDoesNot"):
            main({**tiny, "save_folder": "s3://data/x"})
    with monkeypatch.context() as patch:
        patch.setenv("S3_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(ConfigError, match=r"cannot write to s3://data/x: .*Could not connect"):
            main({**tiny, "save_folder": "s3://data/x"})


def test_a_save_folder_that_cannot_be_written_is_found_first(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (f"{tmp_path}/file/saved", "/proc/nowhere"):
        with pytest.raises(ConfigError, match=f"save_folder: cannot write to {folder}: "):
            main({**tiny, "save_folder": folder})
