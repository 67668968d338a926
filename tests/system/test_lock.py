"""A second run cannot write into the save folder of a live run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpointing.remote_store import RemoteFolder
from checkpointing.stores import LocalFolder
from errors import ConfigError
from main import main
from tests.support.lock import (
    other_process,
    quick,  # noqa: F401
)
from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.usefixtures("small_network", "no_curves")
@pytest.mark.parametrize("kind", ["folder", "object store"])
def test_save_folder_of_live_run_rejects_a_second_run(
    tiny: dict[str, Any], tmp_path: Path, server: S3Server, kind: str
) -> None:
    folder = f"{tmp_path}/saved" if kind == "folder" else "s3://data/locked"
    target = LocalFolder(folder) if kind == "folder" else RemoteFolder(folder)
    tiny |= {"save_folder": folder, "max_duration": "1ba", "eval_interval": "9ep"}
    with other_process(lambda: target.lock("tiny")) as pid:
        with pytest.raises(ConfigError) as caught:
            main(tiny)
        assert f"save_folder: run tiny (process {pid} on " in str(caught.value)
        assert "is writing to" in str(caught.value)
        assert target.names() == []
    main({**tiny, "autoresume": True})  # the killed run no longer holds the folder
    assert target.names() == ["ep0-ba1-rank0.pt"]
    with other_process(lambda: target.lock("tiny")):  # the finished run has released the folder
        pass
