"""Data sets as they are: each layout gives the batches of ADE20K's, and what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import main as program
from checkpointing.weights import load_weights
from convert_ade20k import convert
from data import build_data
from dataset.description import (
    open_description,
)
from dataset.labels import Labels
from extras.preparation import check_command
from tests.support.description import batches, check, laid_out, source, tiny_run  # noqa: F401
from tests.support.layouts import LAYOUTS, NAMES
from training.config import resolve


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_checked(
    layout: str, laid_out: dict[str, Path], capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    assert check([str(laid_out[layout]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["problems"] and not found["oddities"]
    assert found["splits"]["train"]["good_pairs"] == 9
    assert [entry["name"] for entry in found["splits"]["val"]["classes"]] == NAMES


def test_every_layout_trains_evaluates_and_resumes_alike(
    source: Path, laid_out: dict[str, Path], tmp_path: Path, small_network: None
) -> None:
    """Two epochs, one of them cut in the middle; the same bits as from ADE20K's layout."""
    from evaluate import main as evaluate

    def run(name: str, **more: Any) -> tuple[list[float], list[float], Path]:
        folder = tmp_path / name
        config = tiny_run(**more, save_folder=str(folder), save_interval="1ba", autoresume=True)
        if more["description"] is not None:  # as if it were killed after the first batch
            program.main({**config, "max_duration": "1ba"}).close()
        trainer = program.main(config)
        trainer.close()
        weights = [p.double().sum().item() for p in trainer.state.model.parameters()]
        return weights, [float(trainer.state.eval_metric_values["MIoU"])], folder

    plain = {"path": str(source), "base_size": 32, "final_size": 32, "batch_size": 4}
    plain["num_workers"] = 0
    model = {"backbone_arch": "resnet50", "backbone_weights": None, "num_classes": 12}
    expected = run(
        "plain", description=None, model=model, train_dataset=plain, eval_dataset=dict(plain)
    )
    for layout, file in laid_out.items():
        found = run(layout, description=str(file))
        assert found[:2] == expected[:2], layout
        scores = tmp_path / "scores.json"
        checkpoint = str(found[2] / "latest-rank0.pt")
        assert evaluate([checkpoint, "--size", "32", "--json", str(scores)]) == 0
        result = json.loads(scores.read_text())
        assert result["photos"] == 4
        assert [row["class"] for row in result["classes"]] == NAMES
        # What predict.py and export.py draw with.
        description = open_description(str(file))[1]
        assert description is not None
        assert load_weights(checkpoint).classes == list(description.classes)
        by_itself = tmp_path / "by_itself.json"
        arguments = ["--data", str(laid_out["merged"]), "--size", "32", "--json", str(by_itself)]
        assert evaluate([checkpoint, *arguments]) == 0
        assert json.loads(by_itself.read_text())["mIoU"] == result["mIoU"]


def test_shards_hold_the_merged_labels(
    source: Path, laid_out: dict[str, Path], tmp_path: Path
) -> None:
    for layout in ("merged", "colors"):
        out = tmp_path / layout
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}
        beside = check_command.find_source(str(out), None, Labels())
        assert beside.path == str(out) and beside.shards is not None
        assert [info.name for info in beside.description.classes] == NAMES
        spec = {"is_streaming": True, "path": str(out)}
        config = tiny_run(str(laid_out[layout]))  # the original's serves as well
        for section in ("train_dataset", "eval_dataset"):
            config[section] |= spec
        given = build_data(resolve(config), "train")
        config["data"] = str(out / "description.yaml")
        assert next(iter(given.dataloader))[1].equal(
            next(iter(build_data(resolve(config), "train").dataloader))[1]
        )
        plain = tiny_run(None)
        plain["model"]["num_classes"] = 12
        for section in ("train_dataset", "eval_dataset"):
            plain[section] |= {"path": str(source)}
        for ours, theirs in zip(
            given.dataloader, build_data(resolve(plain), "train").dataloader, strict=True
        ):
            assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
        # Verified against the description, and done.
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_suggestion_needs_no_edit(
    layout: str,
    source: Path,
    laid_out: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(check_command, "SPEED_SECONDS", 0.01)
    file = tmp_path / "found.yaml"
    folder = laid_out[layout].parent
    assert check([str(folder), str(file), "--suggest", "--workers", "1"]) == 0
    assert file.read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 1000
    assert check([str(file), "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["splits"]["train"]["good_pairs"] == 9
    assert found["splits"]["val"]["good_pairs"] == 4
    root, description = open_description(str(file))
    assert description is not None
    if layout == "merged":  # nothing tells what is to be merged
        assert len(description.classes) == 25
        return
    theirs = open_description(str(laid_out[layout]))[1]
    assert theirs is not None and description.values.keys() == theirs.values.keys()
    assert [v for v, label in description.values.items() if label == 0] == [0]
    if layout not in ("colors", "lists"):  # whose classes, or names, are in another order
        assert batches(root, "train", description=description) == batches(
            source, "train", num_classes=12
        )
    assert check([str(folder), str(file), "--suggest"]) == 1
    assert "found.yaml already exists; pass a different file" in capsys.readouterr().err
