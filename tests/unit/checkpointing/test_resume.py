"""Tests of checkpointing/resume.py."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from checkpointing.resume import Start, newest_checkpoint
from checkpointing.stores import LocalFolder
from checkpointing.weights import Weights
from errors import ConfigError
from segmentation.classes import ClassInfo
from tests.support.run_helpers import save_whole

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize("damage", ["truncated", "missing", "changed", "empty"])
def test_newest_intact_checkpoint_is_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    _, good, bad = save_whole(tmp_path, 2, 4, 6)
    assert newest_checkpoint(str(tmp_path), "") == (str(bad), str(bad))
    content = bad.read_bytes()
    bad.unlink()
    if damage != "missing":
        changed = content.replace(bytes([6, 0, 0, 0]), bytes([7, 0, 0, 0]))
        damaged = {"truncated": content[:-100], "changed": changed, "empty": b""}[damage]
        assert damaged != content
        bad.write_bytes(damaged)
    assert newest_checkpoint(str(tmp_path), "") == (str(good), str(good))
    assert f"cannot resume from {bad}" in caplog.text


def test_run_without_an_intact_checkpoint_starts_at_batch_0(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_checkpoint(str(tmp_path / "nowhere"), "") is None
    assert newest_checkpoint(str(tmp_path), "") is None
    assert caplog.text == ""
    (only,) = save_whole(tmp_path, 2)
    only.write_bytes(b"half")
    assert newest_checkpoint(str(tmp_path), "") is None
    assert "no complete checkpoint, so the run starts at batch 0" in caplog.text


def test_latest_symlink_takes_precedence_over_later_batches(tmp_path: Path) -> None:
    save_whole(tmp_path, 100, 2, 4)
    assert newest_checkpoint(str(tmp_path), "")[0].endswith("/ep0-ba4-rank0.pt")


def test_later_epoch_is_preferred_at_the_same_batch_number(tmp_path: Path) -> None:
    (first,) = save_whole(tmp_path, 8)
    second = tmp_path / "ep1-ba8-rank0.pt"
    shutil.copy(first, second)
    (tmp_path / "latest-rank0.pt").unlink()
    assert newest_checkpoint(str(tmp_path), "") == (str(second), str(second))
    os.symlink(second.name, tmp_path / "latest-rank0.pt")
    second.write_bytes(b"half")
    assert newest_checkpoint(str(tmp_path), "") == (str(first), str(first))


def test_unreadable_save_folder_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(folder: LocalFolder) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(LocalFolder, "names", unreadable)
    line = f"save_folder: cannot read {tmp_path}: .*Permission denied; check that you can access it"
    with pytest.raises(ConfigError, match=line):
        newest_checkpoint(str(tmp_path), "")


@pytest.mark.parametrize(
    ("names", "values", "line"),
    [
        pytest.param(["road", "car"], {"seed": 17}, None, id="same"),
        pytest.param(
            ["car", "road"], {"seed": 17}, "class 0 is road, but in x.pt it is car", id="order"
        ),
        pytest.param(
            ["road", "tree"], {"seed": 17}, "class 1 is car, but in x.pt it is tree", id="names"
        ),
        pytest.param(["road", "car"], {"seed": 1}, "seed: ", id="value"),
    ],
)
def test_resumed_run_with_other_classes_or_values_is_rejected(
    names: list[str], values: dict[str, int], line: str | None
) -> None:
    classes, recorded = ([ClassInfo(n, (0, 0, 0)) for n in c] for c in (["road", "car"], names))
    weights = Weights({}, config={"seed": 17}, classes=recorded)
    start = Start("x.pt", weights, "x.pt", is_resume=True)
    if line is None:
        start.check_config(values, {"seed": 17}, classes)
        return
    with pytest.raises(ConfigError, match=line) as caught:
        start.check_config(values, {"seed": 17}, classes)
    remedy = "use a new save_folder, with load_path=x.pt load_weights_only=true autoresume=false"
    assert str(caught.value).endswith(remedy)
