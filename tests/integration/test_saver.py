"""Saving checkpoints and resuming: failed saves, and damaged, malicious or foreign checkpoints."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Callback, State

from checkpointing.resume import newest_checkpoint
from checkpointing.stores import LocalFolder, checkpoint_in
from errors import ConfigError, RunError, WeightsError
from main import main
from tests.support.run_helpers import save_whole

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


@pytest.fixture
def tiny(tiny: dict[str, Any]) -> dict[str, Any]:
    """The config of a short run without evaluations."""
    return tiny | {"eval_interval": "9ep"}


@pytest.mark.parametrize("folder", ["{node_rank}-{x", "lab:1"])
def test_save_folder_with_special_characters_works(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny |= {"save_folder": folder, "autoresume": True}
    main({**tiny, "max_duration": "1ba"})
    trainer = main({**tiny, "max_duration": "2ba"})
    assert trainer.state.timestamp.batch == 2
    assert [path.name for path in tmp_path.iterdir()] == [folder]
    tiny |= {"save_folder": None, "autoresume": False, "max_duration": "3ba"}
    main({**tiny, "load_path": f"{folder}/ep0-ba2-rank0.pt"})


class Planted:
    """An object that runs code when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("source", ["load_path", "load_weights_only", "autoresume", "evaluation"])
def test_malicious_code_in_checkpoint_does_not_run(
    tiny: dict[str, Any], tmp_path: Path, source: str
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    path, mark = folder / "ep0-ba2-rank0.pt", tmp_path / "it ran"
    network = {"backbone.conv1.weight": torch.zeros(1)}
    torch.save({"state": {"model": network, "callbacks": Planted(mark)}, "rng": []}, path)
    os.symlink(path.name, folder / "latest-rank0.pt")
    tiny |= {"save_folder": str(folder), "autoresume": source == "autoresume"}
    tiny |= {"load_weights_only": source == "load_weights_only", "is_train": source != "evaluation"}
    if source != "autoresume":
        tiny |= {"load_path": str(path), "save_overwrite": True}
    with pytest.raises(WeightsError, match=r"it contains posix.mkdir, .* could run code") as caught:
        main(tiny)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    with open(path, "rb") as file, pytest.raises(pickle.UnpicklingError):
        torch.load(file)
    torch.load(path, weights_only=False)
    assert mark.exists()  # without the check, the code would run


@pytest.fixture(scope="module")
def tiny_checkpoint(
    tiny_config: dict[str, Any], small_network: None, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The checkpoint of a run of two steps with the config of `tiny`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    changes = {"max_duration": "2ba", "eval_interval": "100ep", "save_folder": str(folder)}
    main({**tiny_config, **changes}).close()
    return folder / "ep0-ba2-rank0.pt"


def test_malicious_code_added_to_real_checkpoint_does_not_run(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    mark = tmp_path / "it ran"
    content = torch.load(tiny_checkpoint, weights_only=False)
    content["state"]["integrations"]["planted"] = Planted(mark)
    torch.save(content, tmp_path / "planted.pt")
    with pytest.raises(WeightsError, match=r"rejected, because it contains"):
        main({**tiny, "load_path": str(tmp_path / "planted.pt")})
    assert not mark.exists()


def test_damaged_newest_checkpoint_is_skipped_and_replaced(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(tiny_checkpoint, tmp_path)
    damaged = tmp_path / "ep0-ba3-rank0.pt"
    damaged.write_bytes(tiny_checkpoint.read_bytes()[:1000])
    os.symlink(damaged.name, tmp_path / "latest-rank0.pt")
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "max_duration": "3ba"}
    trainer = main({**tiny, "save_interval": "1ba", "save_num_checkpoints_to_keep": 2})
    assert trainer.state.timestamp.batch == 3
    assert f"cannot resume from {damaged}: File is not a zip file" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("ep*")) == [
        tiny_checkpoint.name,
        damaged.name,
    ]
    assert newest_checkpoint(str(tmp_path), "")[1] == str(damaged)


@pytest.mark.parametrize("room", [0, 1_000_000])
def test_full_disk_keeps_last_good_checkpoint(
    tiny: dict[str, Any],
    tmp_path: Path,
    tiny_checkpoint: Path,
    room: int,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class FullDisk(Callback):
        def fit_start(self, state: State, logger: Any) -> None:
            if room:  # a different error that also occurs within the file
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            else:
                os.symlink("/dev/full", tmp_path / "ep0-ba3-rank0.pt.unfinished")

    (tmp_path / tiny_checkpoint.name).write_bytes(tiny_checkpoint.read_bytes())
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "save_interval": "1ba"}
    try:
        with pytest.raises(RunError) as caught:
            main(tiny, callbacks=[FullDisk()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = str(caught.value)
    reason = "[Errno 27] File too large" if room else "[Errno 28] No space left on device"
    assert message.startswith(f"cannot save {tmp_path}/ep0-ba3-rank0.pt: {reason}; ")
    assert f"the last good checkpoint is {tmp_path}/{tiny_checkpoint.name}" in message
    assert "\n" not in message
    assert newest_checkpoint(str(tmp_path), "")[1] == f"{tmp_path}/{tiny_checkpoint.name}"
    assert list(tmp_path.glob("ep*")) == [tmp_path / tiny_checkpoint.name]


def test_save_folder_of_other_run_is_rejected(tiny: dict[str, Any], tmp_path: Path) -> None:
    save_whole(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"contains ep0-ba100-rank0.pt from a different run"):
        main({**tiny, "save_folder": str(tmp_path)})
    tiny |= {"save_overwrite": True, "max_duration": "1ba", "save_interval": "1ba"}
    main({**tiny, "save_folder": str(tmp_path)})
    assert newest_checkpoint(str(tmp_path), "")[0].endswith("/ep0-ba1-rank0.pt")


def test_non_finite_weights_are_not_saved(tiny: dict[str, Any], tmp_path: Path) -> None:
    class Poison(Callback):
        def batch_end(self, state: State, logger: Any) -> None:
            if state.timestamp.batch == 2:
                with torch.no_grad():
                    state.model.module.backbone.conv1.weight[0, 0, 0, 0] = float("nan")

    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba"}
    with pytest.raises(
        RunError, match=r"ep0-ba2-rank0.pt was not saved, because its weights are not finite"
    ):
        main(tiny, callbacks=[Poison()])
    assert [path.name for path in tmp_path.glob("ep*")] == ["ep0-ba1-rank0.pt"]


def checkpoints(folder: Path) -> dict[str, bytes]:
    """Return the content of each checkpoint in a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("ep*.pt"))}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        pytest.param({}, "contains ep0-ba2-rank0.pt from a different run", id="new run"),
        pytest.param(
            {"load_path": "{first}/ep0-ba2-rank0.pt", "run_name": "b"},
            "contains ep0-ba2-rank0.pt from a different run",
            id="run from checkpoint in another folder",
        ),
        pytest.param(
            {"load_path": "{other}/ep0-ba2-rank0.pt", "run_name": "b"},
            "contains ep0-ba2-rank0.pt from a different run",
            id="differently named run from checkpoint in this folder",
        ),
        pytest.param(
            {"load_path": "{other}/latest-rank0.pt", "load_weights_only": True},
            "contains ep0-ba2-rank0.pt from a different run",
            id="new run from weights in this folder",
        ),
        pytest.param(
            {"autoresume": True, "run_name": "b"},
            "belongs to run tiny, not to b; use a different save_folder, or set run_name=tiny",
            id="autoresume with different run name",
        ),
    ],
)
def test_checkpoints_of_other_run_stay_without_save_overwrite(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path, changes: Any, line: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint.parent, other, symlinks=True)
    before = checkpoints(other)
    places = {"first": tiny_checkpoint.parent, "other": other}
    changes = {k: v.format_map(places) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ConfigError, match=line):
        main({**tiny, "save_folder": str(other), **changes})
    assert checkpoints(other) == before
    # With save_overwrite, the run replaces the checkpoints of the other run.
    main({**tiny, "save_folder": str(other), "save_overwrite": True, **changes})
    assert list(checkpoints(other)) == ["ep0-ba4-rank0.pt"]


def test_run_resumes_from_load_path_in_its_own_folder(
    tiny: dict[str, Any], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    shutil.copytree(tiny_checkpoint.parent, tmp_path / "own", symlinks=True)
    tiny |= {"save_folder": f"{tmp_path}/own", "load_path": f"{tmp_path}/own"}
    main(tiny)
    assert list(checkpoints(tmp_path / "own")) == ["ep0-ba4-rank0.pt"]


def test_resume_with_lower_limit_keeps_existing_checkpoints(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "save_interval": "1ba"}
    main({**tiny, "max_duration": "3ba", "save_num_checkpoints_to_keep": -1})
    kept_checkpoints = checkpoints(tmp_path)
    assert len(kept_checkpoints) == 3
    main({**tiny, "max_duration": "6ba", "save_num_checkpoints_to_keep": 1})
    assert list(checkpoints(tmp_path)) == [*kept_checkpoints, "ep1-ba6-rank0.pt"]
    assert kept_checkpoints.items() <= checkpoints(tmp_path).items()


def test_file_system_without_symbolic_links_is_supported(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    symlink = os.symlink
    numbers = itertools.cycle([errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])

    def no_links(source: str, target: str, **options: Any) -> None:
        if str(target).startswith(str(tmp_path)):
            number = next(numbers)
            raise OSError(number, os.strerror(number))
        symlink(source, target, **options)

    monkeypatch.setattr(os, "symlink", no_links)
    tiny |= {"save_folder": str(tmp_path), "autoresume": True, "eval_interval": "1ba"}
    main({**tiny, "max_duration": "1ba", "save_best": True, "save_interval": "1ba"})
    assert (tmp_path / "latest-rank0.pt.symlink").read_text() == "ep0-ba1-rank0.pt"
    assert checkpoint_in(tmp_path) == str(tmp_path / "ep0-ba1-rank0.pt")
    assert checkpoint_in(tmp_path / "best-rank0.pt") == str(tmp_path / "ep0-ba1-rank0.pt")
    trainer = main({**tiny, "max_duration": "2ba"})
    assert trainer.state.timestamp.batch == 2
    assert (tmp_path / "latest-rank0.pt.symlink").read_text() == "ep0-ba2-rank0.pt"
    load_path = f"{tmp_path}/latest-rank0.pt"
    tiny |= {"save_folder": None, "autoresume": False, "max_duration": "3ba"}
    assert main({**tiny, "load_path": load_path}).state.timestamp.batch == 3


def test_file_system_without_rename_is_rejected_before_training(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_rename(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "Operation not permitted", source, None, target)

    monkeypatch.setattr(os, "replace", no_rename)
    with pytest.raises(ConfigError, match=r"save_folder: cannot write to .*not permitted"):
        main({**tiny, "save_folder": str(tmp_path)})


def test_run_without_save_folder_logs_that_it_cannot_resume(
    tiny: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = "save_folder is empty: this run saves no checkpoint, so it cannot be resumed"
    main({**tiny, "max_duration": "1ba"})
    assert [record.getMessage() for record in caplog.records].count(line) == 1
    caplog.clear()
    main({**tiny, "max_duration": "1ba", "save_folder": str(tmp_path)})
    assert line not in caplog.text


def test_resumed_run_removes_old_checkpoints_left_by_a_kill(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the run when the last checkpoint is saved but the older ones are not yet removed."""
    tiny |= {"save_folder": str(tmp_path), "save_interval": "1ba", "autoresume": True}
    tiny |= {"save_num_checkpoints_to_keep": 1, "max_duration": "1ep"}  # an epoch has four batches

    def die_at_last(folder: LocalFolder, names: list[str]) -> None:
        if "ep0-ba4-rank0.pt" in folder.names():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "remove", die_at_last)
        with pytest.raises(KeyboardInterrupt):
            main(tiny)
    assert len(checkpoints(tmp_path)) == 4
    main(tiny)
    assert list(checkpoints(tmp_path)) == ["ep0-ba4-rank0.pt"]
