"""Tests of checkpointing/stores.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from checkpointing.stores import LocalFolder, NewCheckpoint, checkpoint_in, outdated
from errors import WeightsError
from tests.support.run_helpers import save_whole

pytestmark = pytest.mark.usefixtures("small_network")


NAMES = [f"ep0-ba{batch}-rank0.pt" for batch in (12, 10, 8, 6, 4)]


@pytest.mark.parametrize(
    ("newest", "keep", "best", "own", "removed"),
    [
        pytest.param(0, 2, None, NAMES, NAMES[2:], id="old checkpoints"),
        pytest.param(0, -1, None, NAMES, [], id="unlimited"),
        pytest.param(2, 2, None, NAMES, NAMES[4:], id="damaged later checkpoints"),
        pytest.param(0, 1, NAMES[3], NAMES, [NAMES[1], NAMES[2], NAMES[4]], id="best checkpoint"),
        pytest.param(0, 1, None, [NAMES[0], NAMES[3]], [NAMES[3]], id="checkpoints of another run"),
        pytest.param(
            0, 2, None, [NAMES[0], NAMES[3]], [], id="checkpoints of another run not counted"
        ),
    ],
)
def test_pruning_removes_only_old_checkpoints_of_the_same_run(
    newest: int, keep: int, best: str | None, own: list[str], removed: list[str]
) -> None:
    assert outdated(NAMES, NAMES[newest], keep, best, own) == removed


def test_old_checkpoint_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = save_whole(tmp_path, 2)
    target, link = LocalFolder(str(tmp_path)), tmp_path / "latest-rank0.pt"
    (tmp_path / "new").write_bytes(b"new")
    calls = []
    replace, remove, sync = os.replace, os.remove, os.fsync

    def record(function: Any) -> Any:
        def recorded(*arguments: Any) -> None:
            assert old.exists()
            calls.append((function.__name__, os.readlink(link)))
            function(*arguments)

        return recorded

    for name, function in {"replace": replace, "remove": remove, "fsync": sync}.items():
        monkeypatch.setattr(os, name, record(function))
    own = ["ep0-ba2-rank0.pt", "ep0-ba4-rank0.pt"]
    target.publish(NewCheckpoint(str(tmp_path / "new"), own[1], keep=1, own=own))
    assert calls == [
        ("replace", "ep0-ba2-rank0.pt"),
        ("fsync", "ep0-ba2-rank0.pt"),
        ("remove", "ep0-ba2-rank0.pt"),  # remove a link that a killed run may have left
        ("replace", "ep0-ba2-rank0.pt"),
        ("fsync", "ep0-ba4-rank0.pt"),
        ("remove", "ep0-ba4-rank0.pt"),
    ]
    assert sorted(os.listdir(tmp_path)) == ["ep0-ba4-rank0.pt", "latest-rank0.pt"]
    assert link.read_bytes() == b"new"


def test_best_checkpoint_is_kept_while_old_ones_are_removed(tmp_path: Path) -> None:
    target, link = LocalFolder(str(tmp_path)), tmp_path / "best-rank0.pt"

    def publish(batch: int, best: int | None) -> list[str]:
        (tmp_path / "new").write_bytes(str(batch).encode())
        names = [f"ep0-ba{number}-rank0.pt" if number else None for number in (batch, best)]
        own = [path.name for path in tmp_path.glob("ep*.pt")]
        target.publish(
            NewCheckpoint(str(tmp_path / "new"), str(names[0]), 1, names[1], [*own, str(names[0])])
        )
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
    with pytest.raises(WeightsError, match=r"the folder contains no checkpoint"):
        checkpoint_in(tmp_path)
