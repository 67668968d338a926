"""Runs that are killed or told to stop, at bad moments, and end as one that was not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.forked import Death, run
from tests.support.resumed_runs import (
    largest_difference,
    make_config,
    make_data,
    read_log,
    same_log,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Generated photos, as folders and as shards."""
    folder = str(tmp_path_factory.mktemp("data"))
    make_data(folder)
    return folder


@pytest.fixture(scope="module")
def hot(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The config of a run with EMA, SAM and MixUp, and the folder of one that nobody disturbed."""
    folder = str(tmp_path_factory.mktemp("reference"))
    config = make_config(data, "hot", "folders", workers=1)
    assert run({**config, "save_folder": folder}, f"{folder}/log") == 0
    return {**config, "autoresume": True, "save_num_checkpoints_to_keep": 2}, folder


def test_a_run_killed_four_times_ends_as_one_that_was_not(
    hot: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, reference = hot
    log = f"{tmp_path}/log"
    config |= {"save_folder": str(tmp_path), "save_interval": "2ba"}
    for death in (
        Death("forward", 3),  # SAM passes twice: in the second batch, before any checkpoint
        Death("batch", 4),  # in mid-epoch, with the checkpoint one batch back
        Death("eval", 1),  # in the first evaluation, with the checkpoint of its batch there
        Death("write", 1),  # in mid-epoch, in the second save
    ):
        assert run(config, log, death) == -signal.SIGKILL
    assert Path(tmp_path, "ep1-ba10-rank0.pt.unfinished").exists()
    assert run(config, log) == 0
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == [
        "ep1-ba10-rank0.pt",
        "ep1-ba12-rank0.pt",
        "latest-rank0.pt",
    ]
    assert largest_difference(str(tmp_path), reference) == 0
    assert same_log(log, f"{reference}/log")


def test_adamw_in_groups_clipped_and_with_a_warm_up_goes_on(data: str, tmp_path: Path) -> None:
    config = make_config(data, "hot", "folders", workers=0) | {
        "optimizer": {
            "name": "adamw",
            "lr": 1e-3,
            "head_lr_scale": 10,
            "no_decay": ["norm", "bias"],
            "clip_norm": 1.0,
        },
        "schedule": {"name": "poly", "warmup": "5ba", "final": 0.1},
        "save_interval": "1ba",
    }
    whole, killed = f"{tmp_path}/whole", f"{tmp_path}/killed"
    assert run({**config, "save_folder": whole}, f"{tmp_path}/log") == 0
    config |= {"save_folder": killed, "autoresume": True}
    for batch in (2, 5):  # during the warm-up, and after it in the next epoch
        assert run(config, f"{tmp_path}/killed.log", Death("batch", batch)) == -signal.SIGKILL
    assert run(config, f"{tmp_path}/killed.log") == 0
    assert largest_difference(killed, whole) == 0
    assert same_log(f"{tmp_path}/killed.log", f"{tmp_path}/log")
    config |= {"max_duration": "3ep", "hot": config["hot"] | {"max_duration": "3ep"}}
    for changed in ({"name": "sgdw"}, {"head_lr_scale": 2.0}, {"no_decay": []}):
        other = config | {"optimizer": config["optimizer"] | changed}
        assert run(other, f"{tmp_path}/other") == 2
        line = Path(f"{tmp_path}/other.0.out").read_text().splitlines()[-1]
        assert line.startswith(f"error: optimizer.{next(iter(changed))}: ")
        assert " was trained with " in line


@pytest.mark.parametrize("moment", ["pointer", "remove"])
def test_shards_and_a_kill_between_the_steps_of_a_save(
    data: str, tmp_path: Path, moment: str
) -> None:
    config = make_config(data, "baseline", "shards", workers=0)
    config |= {"max_duration": "4ba", "eval_interval": "100ep", "save_interval": "1ba"}
    assert run({**config, "save_folder": f"{tmp_path}/whole"}, f"{tmp_path}/log") == 0
    config |= {"save_folder": f"{tmp_path}/killed", "autoresume": True}
    assert run(config, f"{tmp_path}/killed.log", Death(moment, 1)) == -signal.SIGKILL
    assert run(config, f"{tmp_path}/killed.log") == 0
    assert largest_difference(f"{tmp_path}/killed", f"{tmp_path}/whole") == 0
    assert same_log(f"{tmp_path}/killed.log", f"{tmp_path}/log")
    kept = [path.name for path in Path(tmp_path, "killed").glob("ep*.pt")]
    assert kept == ["ep0-ba4-rank0.pt"]


@pytest.mark.parametrize("death", [Death("batch", 3), Death("eval", 0), Death("batch", 5)])
def test_a_signal_saves_and_the_same_command_goes_on(
    hot: tuple[dict[str, Any], str], tmp_path: Path, death: Death
) -> None:
    config, reference = hot
    log = f"{tmp_path}/log"
    config |= {"save_folder": str(tmp_path)}
    number = signal.SIGTERM if death.moment == "batch" else signal.SIGINT
    assert run(config, log, death._replace(signal=number)) == 75
    name = {("batch", 3): "ep0-ba4", ("eval", 0): "ep1-ba6", ("batch", 5): "ep0-ba6"}[death[:2]]
    batch = name.partition("ba")[2]
    assert Path(f"{log}.0.out").read_text().splitlines()[-2:] == [
        f"{number.name}: saving a checkpoint after this batch",
        f"stopped after batch {batch} as told; {tmp_path}/{name}-rank0.pt; "
        "the same command goes on from there",
    ]
    assert (6, "metrics/eval/MIoU") not in read_log(log)
    assert run(config, log) == 0
    assert largest_difference(str(tmp_path), reference) == 0
    assert same_log(log, f"{reference}/log")


def test_a_second_signal_ends_at_once(hot: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    config = {**hot[0], "save_folder": str(tmp_path)}
    death = Death("forward", 2, signal.SIGINT, times=2)  # in the two passes of the second batch
    assert run(config, f"{tmp_path}/log", death) == -signal.SIGINT
    assert not list(tmp_path.glob("*.pt"))


def test_a_complete_run_is_evaluated_when_started_again(
    hot: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, reference = hot
    before = Path(reference, "ep2-ba12-rank0.pt").read_bytes()
    log = f"{tmp_path}/log"
    assert run({**config, "save_folder": reference, "python_log_level": "warning"}, log) == 0
    assert Path(reference, "ep2-ba12-rank0.pt").read_bytes() == before
    output = Path(f"{log}.0.out").read_text()
    assert "nothing is left to train: max_duration=2ep is reached" in output
    found, expected = read_log(log), read_log(f"{reference}/log")
    assert found == {key: value for key, value in expected.items() if key[0] == 12}
