"""Checkpoints: whole or not there, refused when unsafe, and one clear line for every trouble."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State
from omegaconf import OmegaConf
from s3_server import S3Server, s3_server

import main as main_module
import stores
from checkpoints import newest_checkpoint
from config import ConfigError
from data import DataError
from main import main, run
from stores import LocalFolder, RemoteFolder, RunError, outdated
from weights import WeightsError


def add_callback(monkeypatch: pytest.MonkeyPatch, callback: Callback) -> None:
    """Put a callback before those of the runs to come."""
    build = main_module._build_callbacks
    monkeypatch.setattr(main_module, "_build_callbacks", lambda c: [callback, *build(c)])


def save(folder: Path, *batches: int) -> list[Path]:
    """Publish files that count as whole checkpoints."""
    target = LocalFolder(str(folder))
    target.probe()
    paths = []
    for batch in batches:
        name = f"ep0-ba{batch}-rank0.pt"
        torch.save({"batch": torch.full((100,), batch)}, folder / "unfinished")
        target.publish(str(folder / "unfinished"), name, keep=-1)
        paths.append(folder / name)
    return paths


def test_old_checkpoints_go_but_never_later_ones() -> None:
    names = [f"ep0-ba{batch}-rank0.pt" for batch in (12, 10, 8, 6, 4)]
    assert outdated(names, names[0], 2) == names[2:]
    assert outdated(names, names[0], -1) == []
    # 12 and 10 are damaged, and the run went on from 6
    assert outdated(names, names[2], 2) == names[4:]


def test_a_new_checkpoint_is_whole_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = save(tmp_path, 2)
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
    target.publish(str(tmp_path / "new"), "ep0-ba4-rank0.pt", keep=1)
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


@pytest.mark.parametrize("harm", ["truncated", "missing", "changed", "empty"])
def test_the_newest_whole_checkpoint_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: str
) -> None:
    _, good, bad = save(tmp_path, 2, 4, 6)
    assert newest_checkpoint(str(tmp_path), "") == (str(bad), str(bad))
    content = bad.read_bytes()
    bad.unlink()
    if harm != "missing":
        changed = content.replace(bytes([6, 0, 0, 0]), bytes([7, 0, 0, 0]))
        harmed = {"truncated": content[:-100], "changed": changed, "empty": b""}[harm]
        assert harmed != content
        bad.write_bytes(harmed)
    assert newest_checkpoint(str(tmp_path), "") == (str(good), str(good))
    assert f"cannot go on from {bad}" in caplog.text


def test_without_a_whole_checkpoint_the_run_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(str(tmp_path / "nowhere"), "") is None
    assert newest_checkpoint(str(tmp_path), "") is None
    assert caplog.text == ""
    (only,) = save(tmp_path, 2)
    only.write_bytes(b"half")
    assert newest_checkpoint(str(tmp_path), "") is None
    assert "no whole checkpoint; the run begins anew" in caplog.text


def test_what_latest_names_comes_before_later_batches_of_an_earlier_run(tmp_path: Path) -> None:
    save(tmp_path, 100, 2, 4)
    assert newest_checkpoint(str(tmp_path), "")[0].endswith("/ep0-ba4-rank0.pt")


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("by", ["load_path", "load_weights_only", "autoresume", "evaluation"])
def test_a_planted_checkpoint_does_not_run(tiny: dict[str, Any], tmp_path: Path, by: str) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    path, mark = folder / "ep0-ba2-rank0.pt", tmp_path / "it ran"
    network = {"backbone.conv1.weight": torch.zeros(1)}
    torch.save({"state": {"model": network, "callbacks": Planted(mark)}, "rng": []}, path)
    os.symlink(path.name, folder / "latest-rank0.pt")
    tiny |= {"save_folder": str(folder), "autoresume": by == "autoresume"}
    tiny |= {"load_weights_only": by == "load_weights_only", "is_train": by != "evaluation"}
    if by != "autoresume":
        tiny |= {"load_path": str(path), "save_overwrite": True}
    with pytest.raises(WeightsError, match=r"it holds posix.mkdir, .* could run code") as caught:
        main(tiny)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    with open(path, "rb") as file, pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have


def test_a_full_state_with_code_beside_the_weights_does_not_run(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    mark = tmp_path / "it ran"
    content = torch.load(tiny_checkpoint, weights_only=False)
    content["state"]["integrations"]["planted"] = Planted(mark)
    torch.save(content, tmp_path / "planted.pt")
    with pytest.raises(WeightsError, match=r"refused"):
        main({**tiny, "load_path": str(tmp_path / "planted.pt")})
    assert not mark.exists()


@pytest.fixture(scope="module")
def tiny_checkpoint(synthetic: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two steps with the config of `tiny`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    dataset = {"path": synthetic, "base_size": 32, "final_size": 32, "batch_size": 4}
    main(
        {
            "run_name": "tiny",
            "model": {"num_classes": 12, "backbone_arch": "resnet50", "backbone_weights": None},
            "train_dataset": dataset | {"num_workers": 0},
            "eval_dataset": dataset | {"num_workers": 0},
            "optimizer": {"lr": 0.01},
            "max_duration": "2ba",
            "precision": "fp32",
            "pictures": 0,
            "eval_interval": "100ep",
            "save_folder": str(folder),
        }
    ).close()
    return folder / "ep0-ba2-rank0.pt"


def test_a_damaged_newest_checkpoint_is_passed_over_and_replaced(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tiny_checkpoint, tmp_path)
    damaged = tmp_path / "ep0-ba3-rank0.pt"
    damaged.write_bytes(tiny_checkpoint.read_bytes()[:1000])
    os.symlink(damaged.name, tmp_path / "latest-rank0.pt")
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "max_duration": "3ba"}
    trainer = main({**tiny, "save_interval": "1ba", "save_num_checkpoints_to_keep": 2})
    assert trainer.state.timestamp.batch == 3
    assert f"cannot go on from {damaged}: File is not a zip file" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("ep*")) == [
        tiny_checkpoint.name,
        damaged.name,
    ]
    assert newest_checkpoint(str(tmp_path), "")[1] == str(damaged)


def test_a_full_disk_while_saving(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    class FullDisk(Callback):
        def fit_start(self, state: State, logger: Any) -> None:
            os.symlink("/dev/full", tmp_path / "ep0-ba3-rank0.pt.unfinished")

    (tmp_path / tiny_checkpoint.name).write_bytes(tiny_checkpoint.read_bytes())
    add_callback(monkeypatch, FullDisk())
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "save_interval": "1ba"}
    with pytest.raises(RunError) as caught:
        main(tiny)
    message = str(caught.value)
    assert message.startswith(f"cannot save {tmp_path}/ep0-ba3-rank0.pt: ")
    assert "No space left on device" in message
    assert f"the last good checkpoint is {tmp_path}/{tiny_checkpoint.name}" in message
    assert "\n" not in message
    assert newest_checkpoint(str(tmp_path), "")[1] == f"{tmp_path}/{tiny_checkpoint.name}"
    assert list(tmp_path.glob("ep*")) == [tmp_path / tiny_checkpoint.name]


def test_a_save_folder_that_cannot_be_written_is_found_first(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    for folder in (f"{tmp_path}/file/saved", "/proc/nowhere"):
        with pytest.raises(ConfigError, match=f"save_folder: cannot write to {folder}: "):
            main({**tiny, "save_folder": folder})


def test_another_runs_checkpoints_are_not_replaced_by_accident(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    save(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"holds ep0-ba100-rank0.pt of an earlier run"):
        main({**tiny, "save_folder": str(tmp_path)})
    tiny |= {"save_overwrite": True, "max_duration": "1ba", "save_interval": "1ba"}
    main({**tiny, "save_folder": str(tmp_path)})
    assert newest_checkpoint(str(tmp_path), "")[0].endswith("/ep0-ba1-rank0.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    class Break(Callback):
        def after_loss(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                state.loss["total"] = state.loss["total"] * value

    add_callback(monkeypatch, Break())
    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba"}
    with pytest.raises(RunError) as caught:
        main(tiny)
    assert str(caught.value) == (
        f"loss/train/total is {value} in batch 3, at a learning rate of 0.005; the last good "
        f"checkpoint is {tmp_path}/ep0-ba2-rank0.pt; a lower optimizer.lr may help"
    )
    assert newest_checkpoint(str(tmp_path), "")[0] == f"{tmp_path}/ep0-ba2-rank0.pt"


def test_weights_that_are_not_finite_do_not_replace_good_ones(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(Callback):
        def batch_end(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                with torch.no_grad():
                    state.model.module.backbone.conv1.weight[0, 0, 0, 0] = float("nan")

    add_callback(monkeypatch, Poison())
    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba"}
    with pytest.raises(RunError, match=r"ep0-ba2-rank0.pt is not saved: weights are not finite"):
        main(tiny)
    assert [path.name for path in tmp_path.glob("ep*")] == ["ep0-ba1-rank0.pt"]


def test_a_photo_that_vanishes_in_mid_run(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny["train_dataset"]["path"], tmp_path / "data")

    class Vanish(Callback):
        def batch_checkpoint(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                shutil.rmtree(tmp_path / "data/ADEChallengeData2016/images/training")

    add_callback(monkeypatch, Vanish())
    tiny["train_dataset"] |= {"path": str(tmp_path / "data"), "num_workers": 1}
    tiny |= {"save_folder": f"{tmp_path}/saved", "save_interval": "1ba", "max_duration": "4ep"}
    with pytest.raises(
        DataError, match=r"images/training/ADE_train_\d+.jpg: No such file"
    ) as error:
        main({**tiny, "eval_interval": "100ep"})
    assert "\n" not in str(error.value)
    assert newest_checkpoint(f"{tmp_path}/saved", "") is not None


def test_a_loader_process_killed_by_the_kernel(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Kill(Callback):
        def batch_start(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    add_callback(monkeypatch, Kill())
    tiny["train_dataset"]["num_workers"] = 1
    tiny |= {"save_folder": f"{tmp_path}/saved", "save_interval": "1ba", "max_duration": "4ep"}
    OmegaConf.save({**tiny, "eval_interval": "100ep"}, tmp_path / "run.yaml")
    assert run([str(tmp_path / "run.yaml")]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: a loader process ended (DataLoader worker (pid")
    assert "memory ran out: lower num_workers or batch_size" in error
    assert newest_checkpoint(f"{tmp_path}/saved", "") is not None


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def test_a_run_in_an_object_store(tiny: dict[str, Any], server: S3Server, tmp_path: Path) -> None:
    tiny |= {"save_folder": "s3://data/runs/{run_name}", "autoresume": True}
    tiny |= {"save_interval": "1ba", "eval_interval": "100ep", "save_num_checkpoints_to_keep": 2}
    main({**tiny, "max_duration": "3ba"})
    store = RemoteFolder("s3://data/runs/tiny")
    assert store.names() == ["ep0-ba3-rank0.pt", "ep0-ba2-rank0.pt"]
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
    with pytest.raises(ConfigError, match=r"load_path: s3.* has num_classes=12, not 13"):
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
    target.publish(str(paths[1]), "ep0-ba4-rank0.pt", keep=1)
    target.publish(str(paths[2]), "ep0-ba6-rank0.pt", keep=1)
    assert not target.wait(0)
    assert not paths[1].exists()  # overtaken before its turn
    server.start()
    assert target.wait(60)
    assert target.names()[0] == "ep0-ba6-rank0.pt"
    assert target.latest() == "ep0-ba6-rank0.pt"
    (tmp_path / "back").mkdir()
    assert Path(target.fetch("ep0-ba6-rank0.pt", f"{tmp_path}/back")).read_bytes() == content
    assert not any(path.exists() for path in paths)
    assert "cannot upload s3://data/outage/ep0-ba2-rank0.pt" in caplog.text


def test_an_upload_that_is_given_up_ends_the_run(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "UPLOAD_FOR", 0)
    target = RemoteFolder("s3://no-such-bucket/runs")
    (tmp_path / "file").write_bytes(b"checkpoint")
    target.publish(str(tmp_path / "file"), "ep0-ba2-rank0.pt", keep=1)
    with pytest.raises(RunError, match=f"NoSuchBucket.* it is still at {tmp_path}/file"):
        target.wait(60)
    assert (tmp_path / "file").read_bytes() == b"checkpoint"


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
