"""Tests of dataset/paths.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from data import build_data
from dataset import paths
from dataset.matching import list_samples
from errors import DataError
from extras.preparation.synthetic import make
from tests.support.report import ROOT, original, path, run, sample  # noqa: F401
from tests.support.waits import short_measurement  # noqa: F401
from training.config import data_sources, resolve


def test_cyclic_symlinks_are_not_followed(path, capsys):
    folder = path / ROOT / "images/training"
    before = list_samples(str(path), "train")
    (folder / "again").symlink_to(folder)
    (folder / "up").symlink_to(path)
    status, report = run(capsys, path)
    assert (status, report["splits"]["train"]["photos"]) == (0, 24)
    assert list_samples(str(path), "train") == before


def test_symlinked_folders_are_read_once(path, tmp_path):
    expected = [sample.uid for sample in list_samples(str(path), "train")]
    for kind in ("images", "annotations"):
        folder, elsewhere = path / ROOT / kind / "training", tmp_path / "elsewhere" / kind
        elsewhere.parent.mkdir(exist_ok=True)
        folder.rename(elsewhere)
        folder.mkdir()
        (folder / "one").symlink_to(elsewhere)
        (folder / "two").symlink_to(elsewhere)
        (elsewhere / "back").symlink_to(folder)
    uids = [sample.uid for sample in list_samples(str(path), "train")]
    assert uids == [f"one/ADE_train_{uid}" for uid in expected]


@pytest.mark.parametrize("described", [False, True], ids=["ADE20K layout", "fraction split"])
def test_each_dataset_folder_is_read_once_per_process(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: bool
) -> None:
    make(str(tmp_path), training=12, validation=6, size=48)
    root = tmp_path / "ADEChallengeData2016"
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["path"] = str(root if described else tmp_path)
    if described:
        names = {f"class {k}": [k] for k in range(1, 13)}
        train = {"images": "images/training", "masks": "annotations/training"}
        tiny["data"] = {"train": train, "val": {"fraction": 0.4}, "classes": names, "ignore": [0]}
    read: list[str] = []
    list_files = paths.list_files

    def record(folder: str) -> list[str]:
        read.append(os.path.relpath(folder, root))
        return list_files(folder)

    monkeypatch.setattr(paths, "list_files", record)
    config = resolve(tiny)
    sources = data_sources(config)
    for split, source in sources.items():
        build_data(config, split, source=source)
    splits = ["training"] if described else ["training", "validation"]
    assert read == [f"{kind}/{split}" for split in splits for kind in ("images", "annotations")]


def test_new_data_source_reads_the_folders_again(tmp_path: Path) -> None:
    make(str(tmp_path), training=2, validation=1, size=48)
    before = list_samples(str(tmp_path), "train")
    Path(before[0].mask_path).unlink()
    with pytest.raises(DataError, match="its mask is missing"):
        list_samples(str(tmp_path), "train")
