"""`save_best` in runs that are killed and resumed, and in an object store."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import batch_of
from extras.preparation.synthetic import make
from main import main
from tests.support.best import Scores, files, record, saving, scores  # noqa: F401
from tests.support.forked import Death, run
from tests.support.resumed_runs import largest_difference, make_config
from tests.support.s3_server import s3_server

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return the config of a run with `save_best`, and the folder of that run without kills."""
    data = str(tmp_path_factory.mktemp("data"))
    make(f"{data}/folders", training=24, validation=6, size=48)
    folder = tmp_path_factory.mktemp("reference")
    config = make_config(data, "hot", "folders", workers=0)
    config |= {"save_best": True, "eval_interval": "2ba", "save_interval": "3ba"}
    config["seed"] = 28  # With this seed, the mIoU rises until batch 8 and then falls.
    assert run({**config, "save_folder": str(folder)}, f"{folder}/log") == 0
    return {**config, "autoresume": True}, folder


def test_save_best_survives_kills_at_every_stage_of_a_save(
    killed: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    config, reference = killed
    config = {**config, "save_folder": str(tmp_path)}
    for moment in ("eval", "best", "pointer", "write", "remove"):
        assert run(config, f"{tmp_path}/log", Death(moment, 1)) == -signal.SIGKILL, moment
    assert run(config, f"{tmp_path}/log") == 0
    assert files(tmp_path) == files(reference)
    for name in ("best-rank0.pt", "latest-rank0.pt"):
        assert record(tmp_path / name) == record(reference / name)
    assert largest_difference(str(tmp_path), str(reference)) == 0


def test_object_store_keeps_best_checkpoint(
    tiny: dict[str, Any], tmp_path: Path, scores: Scores
) -> None:
    with s3_server():
        keys: dict[str, Any] = {"save_folder": "s3://data/run", "stop_after": "2ba"}
        scores([10, 30])
        main(saving(tiny, tmp_path) | keys | {"max_duration": "2ba"})
        scores([20, 25, 27])
        trainer = main(saving(tiny, tmp_path) | keys)
        assert trainer.state.timestamp.batch == 4
        store = RemoteFolder("s3://data/run")
        assert [batch_of(name) for name in store.names()] == [4, 2]
        # The pointer to the best checkpoint can be given as load_path.
        new_run = {**tiny, "save_folder": None, "max_duration": "3ba"}
        trainer = main({**new_run, "load_path": "s3://data/run/best-rank0.pt"})
        assert trainer.state.timestamp.batch == 3
