"""`python data.py PATH` finds damaged, unused and unlabelled data, and measures the loader."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert_ade20k import convert
from dataset.workers import available_cores
from extras.preparation import check_command, check_report
from segmentation.classes import load_classes
from tests.support.report import (  # noqa: F401
    ROOT,
    cut,
    labels_of,
    main,
    original,
    path,
    run,
    sample,
    write,
    wrong_label,
)
from tests.support.waits import measure_loader, short_measurement  # noqa: F401


@pytest.mark.parametrize(
    ("rule", "arguments", "verdict"),
    [
        pytest.param(
            lambda labels: np.where(labels == 5, 0, labels),
            ["--num-classes", "12"],
            "training would work, but no training mask has class 4",
            id="class missing in the middle",
        ),
        pytest.param(
            lambda labels: labels,
            ["--num-classes", "15"],
            "training would work, but no training mask has the classes 12, 13, 14; "
            "use --num-classes 12 if there are no other classes",
            id="fewer classes than num_classes",
        ),
        pytest.param(
            lambda labels: labels == 3,
            ["--num-classes", "2"],
            "training would work, but no training mask has class 1; use --no-ignore-background "
            "to make label 0 a class",
            id="binary masks, 0 ignored",
        ),
        pytest.param(
            lambda labels: labels == 3,
            ["--num-classes", "2", "--no-ignore-background"],
            "training would work; no problems found",
            id="binary masks, 0 a class",
        ),
        pytest.param(
            lambda labels: labels * 0,
            ["--num-classes", "12"],
            "training would work but learn nothing: no training mask has a labelled pixel",
            id="no labelled pixel",
        ),
    ],
)
def test_check_names_classes_missing_from_training_masks(path, capsys, rule, arguments, verdict):
    for file in (path / ROOT / "annotations").rglob("*.png"):
        write(file, rule(labels_of(file)).astype(np.uint8))
    assert main([str(path), *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def leave_out(root: Path) -> None:
    (root / "images/testing").mkdir()
    for number in (1, 2):
        shutil.copy(root / f"images/training/ADE_train_{number:08}.jpg", root / "images/testing")


def copy_to_validation(root: Path) -> None:
    for kind, suffix in (("images", "jpg"), ("annotations", "png")):
        source = root / kind / f"training/ADE_train_00000003.{suffix}"
        shutil.copy(source, root / kind / f"validation/other.{suffix}")


FOLDERS = {
    "train": {"images": "images/training", "masks": "annotations/training"},
    "val": {"images": "images/validation", "masks": "annotations/validation"},
}


@pytest.mark.parametrize(
    ("change", "keys", "verdict"),
    [
        pytest.param(leave_out, None, "but 2 images are left out", id="unused folder"),
        pytest.param(
            leave_out, {}, "but 2 images are left out", id="unused folder with description"
        ),
        pytest.param(
            leave_out, {"exclude": "images/testing"}, "no problems found", id="excluded folder"
        ),
        pytest.param(
            copy_to_validation,
            None,
            "but 1 image is in both splits",
            id="same content in both splits",
        ),
        pytest.param(
            lambda root: None,
            {"val": FOLDERS["train"], "exclude": ["images/validation", "annotations/validation"]},
            "but 24 images are in both splits",
            id="same path in both splits",
        ),
        pytest.param(
            lambda root: (leave_out(root), copy_to_validation(root)),
            None,
            "but 2 images are left out; 1 image is in both splits",
            id="unused image and image in both splits",
        ),
        pytest.param(
            lambda root: (root / "a.gif").write_bytes(b""),
            None,
            "but 1 file may be an image that is left out",
            id="file of unknown type",
        ),
    ],
)
def test_check_counts_unused_images_and_images_in_both_splits(
    path, tmp_path, capsys, change, keys, verdict
):
    root = path / ROOT
    change(root)
    arguments = [str(path), "--num-classes", "12"]
    if keys is not None:
        classes = {f"kind {k}": [k] for k in range(1, 13)}
        described = {"root": str(root), **FOLDERS, "classes": classes, "ignore": [0], **keys}
        (tmp_path / "set.yaml").write_text(json.dumps(described))
        arguments = [str(tmp_path / "set.yaml")]
    assert main([*arguments, "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(verdict) or lines[-1].startswith(verdict)
    leaks = [line for line in lines if line.startswith("  ") and "is in both splits" in line]
    counted = re.search(r"(\d+) images? (is|are) in both", verdict)
    assert len(leaks) == min(check_report.SHOWN, int(counted[1]) if counted else 0)


def test_picture_option_draws_a_sheet_of_samples(path, tmp_path, monkeypatch):
    monkeypatch.setattr(check_command, "SPEED_BATCH", 16)
    picture = tmp_path / "sheet.png"
    assert main([str(path), "--num-classes", "12", "--picture", str(picture)]) == 0
    sheet = np.array(Image.open(picture))
    assert sheet.shape[0] == 3 * 512 and sheet.shape[1] > 4 * 512
    shown_colors = {tuple(color) for color in sheet[:512].reshape(-1, 3)}
    assert shown_colors & {
        info.color for info in load_classes(None, 12)
    }  # the colours of the legend


def test_check_accepts_data_set_folder_and_its_parent(path, capsys):
    assert run(capsys, path)[0] == 0
    assert run(capsys, path / ROOT)[0] == 0


def test_background_and_ignore_options_select_the_class_labels(path, capsys):
    """Labels 0 to 12 are read as classes 0 to 12, or as 1 to 11 with label 12 ignored."""
    arguments = [str(path), "--json", "--num-classes"]
    assert main([*arguments, "13", "--keep-background"]) == 0
    entries = json.loads(capsys.readouterr().out)["splits"]["train"]["classes"]
    assert [entry["label"] for entry in entries] == list(range(13)) and entries[0]["photos"] > 0
    assert main([*arguments, "12", "--keep-background"]) == 1
    assert "but the classes are labels 0 to 11" in capsys.readouterr().out
    assert main([*arguments, "11"]) == 1
    assert "but the classes are labels 1 to 11" in capsys.readouterr().out
    assert main([*arguments, "11", "--ignore-label", "12"]) == 0


def test_check_names_damaged_shard(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "dataset.downloads.time.sleep", lambda seconds: None
    )  # no pause between attempts
    shards, cache = tmp_path / "shards", tmp_path / "cache"
    convert(str(path), str(shards), size_limit="20kb", workers=1)
    assert run(capsys, shards, cache)[0] == 0
    for folder in (cache, shards):  # damage the shard in the cache, and later the original
        shard = folder / "train/shard.00001.mds"
        content = bytearray(shard.read_bytes())
        content[-100] ^= 255
        shard.write_bytes(content)
        status, report = run(capsys, shards, cache)
        (problem,) = report["problems"]
        assert status == 1
        assert problem["path"].endswith("/shards/train/shard.00001.mds")
        assert report["splits"]["val"]["good_pairs"] == 4
        shutil.rmtree(cache)
    (shards / "train/shard.00001.mds").unlink()
    status, report = run(capsys, shards, cache)
    assert status == 1 and report["problems"][0]["path"].endswith("/train/shard.00001.mds")
    (shards / "val/index.json").unlink()
    status, report = run(capsys, shards, tmp_path / "other cache")
    assert {Path(problem["path"]).name for problem in report["problems"]} == {
        "shard.00001.mds",
        "val",
    }


def test_check_measures_speed_of_training_loader(path, capsys, monkeypatch):
    monkeypatch.setattr(check_command, "SPEED_BATCH", 16)
    monkeypatch.setattr(check_command, "measure_loader", measure_loader)
    status, report = run(capsys, path)
    assert status == 0
    assert report["loader"]["workers"] == min(8, available_cores())
    assert report["loader"]["batches"] == 3 * [[[16, 3, 512, 512], [16, 512, 512]]]
