"""Data sets with a description train like ADE20K's layout, and suggestions need no edits."""

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
from tests.support.waits import short_measurement  # noqa: F401
from training.config import resolve


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_accepts_every_data_set_layout(
    layout: str, laid_out: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    assert check([str(laid_out[layout]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert not report["problems"] and not report["oddities"]
    assert report["splits"]["train"]["good_pairs"] == 9
    assert [entry["name"] for entry in report["splits"]["val"]["classes"]] == NAMES


def test_described_data_set_trains_and_scores_like_ade20k_layout(
    source: Path, laid_out: dict[str, Path], tmp_path: Path, small_network: None
) -> None:
    """Weights and mIoU must be identical; a unit test compares the batches of each layout."""
    from evaluate import main as evaluate

    def run(**keys: Any) -> tuple[list[float], float]:
        trainer = program.main(tiny_run(**keys, save_folder=str(tmp_path), save_overwrite=True))
        trainer.close()
        weights = [p.double().sum().item() for p in trainer.state.model.parameters()]
        return weights, float(trainer.state.eval_metric_values["MIoU"])

    plain = {"path": str(source), "base_size": 32, "final_size": 32, "batch_size": 4}
    plain["num_workers"] = 0
    model = {"backbone_arch": "resnet50", "backbone_weights": None, "num_classes": 12}
    expected = run(description=None, model=model, train_dataset=plain, eval_dataset=dict(plain))
    assert run(description=str(laid_out["colors"])) == expected
    checkpoint, results = str(tmp_path / "latest-rank0.pt"), []
    for data in ([], ["--data", str(laid_out["merged"])]):
        scores = tmp_path / "scores.json"
        assert evaluate([checkpoint, *data, "--size", "32", "--json", str(scores)]) == 0
        results.append(json.loads(scores.read_text()))
        assert results[-1]["photos"] == 4
        assert [row["class"] for row in results[-1]["classes"]] == NAMES
    assert results[0]["mIoU"] == results[1]["mIoU"]
    # The checkpoint has the classes, with which predict.py and export.py draw.
    description = open_description(str(laid_out["colors"]))[1]
    assert description is not None
    assert load_weights(checkpoint).classes == list(description.classes)


def test_shards_contain_merged_labels(
    source: Path, laid_out: dict[str, Path], tmp_path: Path
) -> None:
    for layout in ("merged", "colors"):
        out = tmp_path / layout
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}
        beside = check_command.find_source(str(out), None, Labels())
        assert beside.path == str(out) and beside.shards is not None
        assert [info.name for info in beside.description.classes] == NAMES
        spec = {"is_streaming": True, "path": str(out)}
        config = tiny_run(
            str(laid_out[layout])
        )  # train on the shards with the original description
        for section in ("train_dataset", "eval_dataset"):
            config[section] |= spec
        data_spec = build_data(resolve(config), "train")
        config["data"] = str(out / "description.yaml")
        assert next(iter(data_spec.dataloader))[1].equal(
            next(iter(build_data(resolve(config), "train").dataloader))[1]
        )
        plain = tiny_run(None)
        plain["model"]["num_classes"] = 12
        for section in ("train_dataset", "eval_dataset"):
            plain[section] |= {"path": str(source)}
        for ours, theirs in zip(
            data_spec.dataloader, build_data(resolve(plain), "train").dataloader, strict=True
        ):
            assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1])
        # Converting again only verifies the existing shards.
        assert convert(str(laid_out[layout]), str(out), workers=1) == {"train": 9, "val": 4}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_suggested_description_works_without_edits(
    layout: str,
    source: Path,
    laid_out: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = tmp_path / "found.yaml"
    folder = laid_out[layout].parent
    assert check([str(folder), str(file), "--suggest", "--workers", "1"]) == 0
    assert file.read_text() in capsys.readouterr().out
    with Image.open(tmp_path / "found.png") as picture:
        assert picture.width > 1000
    assert check([str(file), "--workers", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["splits"]["train"]["good_pairs"] == 9
    assert report["splits"]["val"]["good_pairs"] == 4
    root, description = open_description(str(file))
    assert description is not None
    if layout == "merged":  # the files do not tell which labels belong to one class
        assert len(description.classes) == 25
        return
    theirs = open_description(str(laid_out[layout]))[1]
    assert theirs is not None and description.values.keys() == theirs.values.keys()
    assert [v for v, label in description.values.items() if label == 0] == [0]
    if layout not in (
        "colors",
        "lists",
    ):  # the classes or images of these layouts have a different order
        assert batches(root, "train", description=description) == batches(
            source, "train", num_classes=12
        )
    assert check([str(folder), str(file), "--suggest"]) == 1
    assert "found.yaml already exists; pass a different file" in capsys.readouterr().err
