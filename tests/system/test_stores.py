"""Runs that save checkpoints to an object store, resume from it and load weights from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpointing.remote_store import RemoteFolder
from errors import ConfigError
from main import main
from tests.support.s3_server import S3Server
from tests.support.stores import server  # noqa: F401

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


def test_run_resumes_and_loads_weights_from_object_store(
    tiny: dict[str, Any], server: S3Server, tmp_path: Path
) -> None:
    tiny |= {"save_folder": "s3://data/runs/{run_name}", "autoresume": True}
    tiny |= {"save_interval": "1ba", "eval_interval": "100ep", "save_num_checkpoints_to_keep": 2}
    main({**tiny, "max_duration": "3ba"})
    store = RemoteFolder("s3://data/runs/tiny")
    assert store.names()[0] == "ep0-ba3-rank0.pt"
    assert len(store.names()) == 2
    assert store.latest() == "ep0-ba3-rank0.pt"

    # A machine without local files resumes even though the newest checkpoint is damaged.
    body = store.store.client.get_object(Bucket="data", Key="runs/tiny/ep0-ba3-rank0.pt")["Body"]
    half = body.read()[:100_000]
    store.store.client.put_object(Bucket="data", Key="runs/tiny/ep0-ba3-rank0.pt", Body=half)
    trainer = main({**tiny, "max_duration": "4ba"})
    assert len(trainer.state.callbacks[-1].saved_checkpoints) == 2
    assert store.names() == ["ep0-ba4-rank0.pt", "ep0-ba3-rank0.pt"]

    # Other runs load the checkpoint by its own name and by the name of the pointer.
    for name in ("ep0-ba4-rank0.pt", "latest-rank0.pt"):
        new_run = {**tiny, "autoresume": False, "save_folder": None, "max_duration": "5ba"}
        trainer = main({**new_run, "load_path": f"s3://data/runs/tiny/{name}"})
        assert trainer.state.timestamp.batch == 5
    model = {"num_classes": 13, "backbone_arch": "resnet50", "backbone_weights": None}
    with pytest.raises(
        ConfigError, match=r"model.num_classes: the config sets 13, but s3:.* was trained with 12"
    ):
        main({**new_run, "load_path": "s3://data/runs/tiny/latest-rank0.pt", "model": model})
    with pytest.raises(ConfigError, match=r"load_path: cannot read s3://data/nothing.pt"):
        main({**new_run, "load_path": "s3://data/nothing.pt"})
