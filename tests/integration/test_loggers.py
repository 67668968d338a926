"""Logger errors are a single line; a resumed run continues its W&B and MLflow runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import wandb

from checkpointing.weights import load_weights
from errors import ConfigError
from main import build_trainer, main
from tests.support.loggers import Failing, ServiceError
from training import loggers as loggers_module
from training.config import resolve
from training.loggers import REMEDIES

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


@pytest.mark.parametrize("name", ["wandb", "mlflow", "neptune", "tensorboard"])
@pytest.mark.parametrize("step", ["__init__", "init", "after_load", "log_hyperparameters"])
def test_failing_logger_service_gives_one_line_error_at_start(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, step: str
) -> None:
    error = ServiceError("503\nService Unavailable.")
    monkeypatch.setitem(loggers_module.CLASSES, name, lambda: Failing(step, error))
    monkeypatch.setattr("training.config_checks.importlib.util.find_spec", lambda package: True)
    tiny["loggers"] = {name: {}}
    with pytest.raises(ConfigError) as caught:
        build_trainer(resolve(tiny))
    assert str(caught.value) == f"loggers.{name}: 503 Service Unavailable; {REMEDIES[name]}"


def test_wandb_without_api_key_suggests_login(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**arguments: Any) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(
        ConfigError, match=r"^loggers\.wandb: api_key .*; run `wandb login`, or set"
    ):
        build_trainer(resolve({**tiny, "loggers": {"wandb": {"project": "p"}}}))


def test_resumed_run_continues_its_wandb_and_mlflow_runs(
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import mlflow

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    store = str(tmp_path / "mlruns")
    tiny |= {"save_folder": str(tmp_path / "run"), "save_interval": "1ba", "autoresume": True}
    tiny["loggers"] = {
        "wandb": {"project": "p", "init_kwargs": {"dir": str(tmp_path)}},
        "mlflow": {"tracking_uri": store, "experiment_name": "p", "synchronous": True},
    }

    def run(**changes: Any) -> dict[str, str]:
        main({**tiny, **changes}).close()
        wandb.finish()
        return dict(load_weights(tmp_path / "run").server_runs)

    first = run(max_duration="1ba")
    assert first.keys() == {"wandb", "mlflow"}
    assert run(max_duration="2ba") == first
    assert "it keeps the first value of max_duration" in caplog.text
    # The folders are named offline-run-TIME-ID. If two runs start in the same second, W&B appends
    # "-1" to the second name.
    ids = {path.name.split("-")[3] for path in tmp_path.glob("wandb/offline-run-*")}
    assert ids == {first["wandb"]}
    client = mlflow.MlflowClient(store)
    (record,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert record.info.run_id == first["mlflow"]
    assert len(client.get_metric_history(first["mlflow"], "loss/train/total")) == 2

    # A new server run starts if the old one was deleted, or if another run loads the checkpoint.
    client.delete_run(first["mlflow"])
    third = run(max_duration="3ba")
    assert third["wandb"] == first["wandb"] and third["mlflow"] != first["mlflow"]
    assert re.search(rf"run {first['mlflow']} no longer exists, so a new run starts", caplog.text)
    for path in tmp_path.glob(f"mlruns/*/{third['mlflow']}"):
        path.rename(tmp_path / "removed")
    fourth = run(max_duration="4ba")
    assert fourth["mlflow"] not in (first["mlflow"], third["mlflow"])
    start = {"load_path": str(tmp_path / "run"), "autoresume": False, "run_name": "other"}
    main({**tiny, **start, "max_duration": "5ba", "save_folder": str(tmp_path / "other")}).close()
    wandb.finish()
    other = load_weights(tmp_path / "other").server_runs
    assert other["wandb"] != first["wandb"] and other["mlflow"] != fourth["mlflow"]
