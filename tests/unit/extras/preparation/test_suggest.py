"""Tests of extras/preparation/suggest.py."""

from __future__ import annotations

import errno
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from dataset.description import (
    open_description,
)
from errors import DataError, OutputError
from extras.preparation import check_command
from extras.preparation import suggest as suggestions
from extras.preparation.suggest import suggest
from tests.support.description import check
from tests.support.layouts import lay_out
from tests.support.suggest import N, check, lay_out


def test_suggested_description_has_names_splits_and_guesses(tmp_path: Path) -> None:
    colors = np.array([[128, 0, 0], [0, 128, 0], [0, 0, 0]], np.uint8)
    rng = np.random.default_rng(0)
    for number in range(12):
        image = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        index = rng.integers(0, 2, (3, 3)).repeat(8, 0).repeat(8, 1)
        index[0, :4] = 2
        cv2.imwrite(str(tmp_path / f"img_{number:03}.png"), image)
        cv2.imwrite(str(tmp_path / f"img_{number:03}_L.png"), colors[index][..., ::-1])
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nwood shed,128,0,0\npond,0,128,0\n")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["train"] == {"images": "{stem}.png", "masks": "{stem}_L.png"}
    assert raw["val"] == {"fraction": 0.15}
    assert set(raw["classes"]) == {"wood shed", "pond"} and raw["ignore"] == [[0, 0, 0]]
    text = suggest(str(tmp_path), 1).text
    assert text.count("# A guess") == 2 and "0.694% of the pixels" in text


def test_suggested_description_with_unusual_paths_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "Hof ü 字 \U0001f600 \"#'"
    for number in range(6):
        for kind in ("\U0001f4f7", "ids"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(image).save(folder / f"\U0001f4f7/{number}.jpg")
        Image.fromarray(np.eye(24, dtype=np.uint8)).save(folder / f"ids/{number}.png")
    file = tmp_path / "found.yaml"
    assert check([str(folder), str(file), "--suggest", "--workers", "1"]) == 0
    assert open_description(str(file))[0] == str(folder)


def test_description_that_cannot_be_suggested_gives_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(DataError, match="none does not exist"):
        suggest(str(tmp_path / "none"), 1)
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(DataError, match=": found 1 images and 0 masks, but no mask name matches"):
        suggest(str(tmp_path), 1)
    (tmp_path / "mine.png").write_bytes(b"a picture of somebody's")
    for name, reason in (
        ("mine.yaml", "mine.png already exists"),
        ("mine", "must be the path of a new .yaml file"),
    ):
        assert check([str(tmp_path), "--suggest", str(tmp_path / name)]) == 1
        assert reason in capsys.readouterr().err


def test_full_disk_leaves_no_suggested_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path / "set", [("i/{}.jpg", "m/{}.png", N)])

    def fail(path: Path, text: str) -> None:
        raise OutputError(errno.ENOSPC, "full")

    arguments = [str(tmp_path / "set"), str(tmp_path / "set.yaml"), "--suggest", "--workers", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(check_command, "write_file", fail)
        assert check(arguments) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert check(arguments) == 0
    assert open_description(str(tmp_path / "set.yaml"))[0] == str(tmp_path / "set")


def test_suggested_description_that_misses_pairs_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay_out(tmp_path, [("i/{}.jpg", "m/{}.png", N)])
    monkeypatch.setattr(suggestions, "pair_described", lambda *_: ([], []))
    reason = r"8 images have masks, but the pattern train: .* matches 0 images"
    with pytest.raises(DataError, match=reason):
        suggest(str(tmp_path), 1)


def test_lists_are_not_read_if_folders_are_the_splits(tmp_path: Path) -> None:
    for number in range(8):
        split = "val" if number > 5 else "train"
        for kind in ("images", "masks"):
            (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(number).integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"images/{split}/{number}.jpg")
        Image.fromarray(np.eye(24, dtype=np.uint8)).save(tmp_path / f"masks/{split}/{number}.png")
    (tmp_path / "train.lst").symlink_to("missing.lst")
    raw = yaml.safe_load(suggest(str(tmp_path), 1).text)
    assert raw["val"] == {"images": "images/val/{stem}.jpg", "masks": "masks/val/{stem}.png"}
