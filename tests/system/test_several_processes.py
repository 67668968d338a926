"""Runs on several ranks give the results of one rank, and all ranks end if one is killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from extras.preparation.synthetic import make
from tests.support.forked import Death, run, run_ranks
from tests.support.resumed_runs import make_config, read_log, tensors

LOSS = "loss/train/total"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """Return a config with 16 training images, and the folder of its run on one rank."""
    folder = str(tmp_path_factory.mktemp("one"))
    make(f"{folder}/folders", training=16, validation=7, size=48)
    config = make_config(folder, "baseline", "folders", workers=0)
    config |= {"max_duration": "6ba", "eval_interval": "100ep", "autoresume": True}
    config["device_train_microbatch_size"] = 2
    config["eval_dataset"]["batch_size"] = 6
    config["model"]["sync_bn"] = False  # BatchNorm statistics per micro-batch
    assert run({**config, "save_folder": f"{folder}/saved"}, f"{folder}/log") == 0
    return config, folder


def losses(log: str) -> list[float]:
    """Return the loss of every batch; assert that each is logged once."""
    by_step = {step: values for (step, name), values in read_log(log).items() if name == LOSS}
    assert all(len(values) == 1 for values in by_step.values())
    assert sorted(by_step) == list(range(len(by_step)))
    return [by_step[step][0] for step in sorted(by_step)]


def test_losses_on_two_ranks_equal_losses_on_one_rank(
    one: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, folder = one
    config = {**config, "save_folder": str(tmp_path)}
    assert run_ranks(config, f"{tmp_path}/log", 2) == [0, 0]
    expected = losses(f"{folder}/log")
    assert len(set(expected)) == 6
    assert losses(f"{tmp_path}/log") == pytest.approx(expected, abs=1e-5)


def test_sync_bn_statistics_equal_those_of_the_full_batch(
    one: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config = {**one[0], "max_duration": "1ba", "device_train_microbatch_size": 4}
    config["model"] = {**config["model"], "sync_bn": True}
    checkpoints = []
    for ranks in (1, 2):
        config["save_folder"] = f"{tmp_path}/{ranks}"
        assert run_ranks(config, f"{tmp_path}/log{ranks}", ranks) == [0] * ranks
        checkpoints.append(tensors(f"{tmp_path}/{ranks}"))
    # Compare only the backbone, because the head's dropout differs between ranks.
    names = [name for name in checkpoints[0] if "backbone" in name and "running" in name]
    assert len(names) > 20
    for name in names:
        torch.testing.assert_close(checkpoints[1][name], checkpoints[0][name], rtol=1e-4, atol=1e-5)


def test_evaluation_score_is_equal_for_any_number_of_ranks(
    one: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, folder = one
    config = {**config, "is_train": False, "autoresume": False}
    config["load_path"] = f"{folder}/saved/latest-rank0.pt"
    scores = []
    for ranks in (1, 2, 3):
        log = f"{tmp_path}/{ranks}"
        assert run_ranks(config, log, ranks) == [0] * ranks
        values = read_log(log)
        scores.append((values[0, "metrics/eval/MIoU"], values[0, "metrics/eval/CrossEntropy"]))
    assert scores[0][0] == scores[1][0] == scores[2][0]
    assert scores[1][1] == pytest.approx(scores[0][1], rel=1e-5)
    assert scores[2][1] == pytest.approx(scores[0][1], rel=1e-5)


def test_other_ranks_end_when_one_rank_is_killed(
    one: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    config, _ = one
    config = {**config, "save_folder": str(tmp_path)}
    start = time.monotonic()
    status = run_ranks(config, f"{tmp_path}/log", 2, Death("batch", 2))
    assert status == [75, -signal.SIGKILL]
    assert time.monotonic() - start < 60
    last = Path(f"{tmp_path}/log.0.out").read_text().splitlines()[-1]
    assert last.startswith("error: process 1 at 127.0.0.1 ended without a message: it was killed")
