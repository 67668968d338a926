"""Runs and evaluations on reordered or renamed classes match them by name or reject them."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import evaluate
import export
from checkpointing.weights import load_weights, save_weights
from convert_ade20k import convert
from data import build_data
from errors import ClassError, ConfigError
from main import main
from predict import Segmenter
from tests.support.layouts import NAMES, lay_out
from training.config import resolve

pytestmark = pytest.mark.usefixtures("small_network", "no_curves")


LAYER = "classifier.conv_seg.weight"


@pytest.fixture(scope="module")
def described(synthetic: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The description file of a data set with 12 classes."""
    return lay_out(synthetic, tmp_path_factory.mktemp("described"), "folders", 12)


def reordered(file: Path, names: list[str]) -> str:
    """Write a copy of a description with its classes reordered or renamed; return its path."""
    raw = yaml.safe_load(file.read_text())
    old = [*raw["classes"]]
    renamed = iter([name for name in old if name not in names])
    entries = [raw["classes"][name if name in old else next(renamed)] for name in names]
    raw["classes"] = dict(zip(names, entries, strict=True))
    other = file.with_name(f"{names[0]}-{names[-1]}.yaml")
    other.write_text(yaml.safe_dump(raw, sort_keys=False))
    return str(other)


def on(tiny: dict[str, Any], description: str | Path, **keys: Any) -> dict[str, Any]:
    """Return the config of a run on a data set with this description."""
    sections = {
        name: {key: value for key, value in tiny[name].items() if key != "path"}
        for name in ("train_dataset", "eval_dataset")
    }
    model = {key: value for key, value in tiny["model"].items() if key != "num_classes"}
    return {**tiny, **sections, "model": model, "data": str(description), **keys}


@pytest.fixture(scope="module")
def trained(
    tiny_config: dict[str, Any],
    described: Path,
    small_network: None,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, float]:
    """The checkpoint and mIoU of a run, trained until its network distinguishes some classes."""
    folder = tmp_path_factory.mktemp("trained")
    config = on(tiny_config, described, save_folder=str(folder), max_duration="4ep")
    config["optimizer"], config["eval_interval"] = {"lr": 0.05}, "4ep"
    trainer = main(config)
    miou = float(trainer.state.eval_metric_values["MIoU"])
    trainer.close()
    assert miou > 1
    return str(folder / "latest-rank0.pt"), miou


def score(*arguments: str, folder: Path) -> dict[str, Any]:
    file = folder / "scores.json"
    options = ["--protocol", "square", "--json", str(file)]
    assert evaluate.main([*arguments, *options]) == 0
    return json.loads(file.read_text())


REVERSED = NAMES[::-1]
PARTLY = ["lorry", *NAMES[1:]]
OTHERS = [f"thing {letter}" for letter in "abcdefghijkl"]


def test_evaluate_matches_classes_of_description_by_name(
    trained: tuple[str, float], described: Path, tmp_path: Path
) -> None:
    path, miou = trained
    expected = score(path, "--data", str(described), folder=tmp_path)
    assert expected["mIoU"] == pytest.approx(miou, abs=1e-4)
    for protocol in ("square", "paper"):
        options = "--protocol", protocol
        both = [
            score(path, "--data", data, *options, folder=tmp_path)["classes"]
            for data in (str(described), reordered(described, REVERSED))
        ]
        assert both[0] == both[1]
    numbers = reordered(described, [f"class {k}" for k in range(12)])
    assert score(path, "--data", numbers, folder=tmp_path)["mIoU"] == expected["mIoU"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(PARTLY, "class 0 is lorry, but in .* it is sky", id="one class renamed"),
        pytest.param(OTHERS, "class 0 is thing a, but in .* it is sky", id="all classes renamed"),
    ],
)
def test_evaluation_rejects_data_set_with_other_class_names(
    trained: tuple[str, float],
    tiny: dict[str, Any],
    described: Path,
    capsys: pytest.CaptureFixture[str],
    names: list[str],
    message: str,
) -> None:
    path, _ = trained
    data = reordered(described, names)
    assert evaluate.main([path, "--data", data]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {data}: class 0 is {names[0]}") and error.count("\n") == 1
    with pytest.raises(ClassError, match=message):
        main(on(tiny, data, is_train=False, load_path=path))


def test_evaluation_by_main_py_matches_classes_by_name(
    trained: tuple[str, float], tiny: dict[str, Any], described: Path, caplog: Any
) -> None:
    path, miou = trained
    for data in (described, reordered(described, REVERSED)):
        trainer = main(on(tiny, data, is_train=False, load_path=path))
        assert float(trainer.state.eval_metric_values["MIoU"]) == pytest.approx(miou, abs=1e-4)
    assert "classifier.conv_seg: classes in another order, matched by name" in caplog.text


def test_evaluation_of_a_save_folder_matches_classes_by_name(
    trained: tuple[str, float], tiny: dict[str, Any], described: Path, caplog: Any
) -> None:
    path, miou = trained
    keys = {"is_train": False, "autoresume": True, "save_folder": str(Path(path).parent)}
    trainer = main(on(tiny, reordered(described, REVERSED), **keys))
    assert float(trainer.state.eval_metric_values["MIoU"]) == pytest.approx(miou, abs=1e-4)
    line = r"save_folder: \S+ba\d+-rank0.pt: classifier.conv_seg: classes in another order, matched"
    assert re.search(line, caplog.text)
    message = r"^save_folder: the run: class 0 is lorry, but in .*ba\d+-rank0.pt it is sky"
    with pytest.raises(ClassError, match=message):
        main(on(tiny, reordered(described, PARTLY), **keys))


@pytest.mark.parametrize(
    ("names", "by_name", "num_loaded"),
    [
        pytest.param(REVERSED, False, 12, id="reversed order"),
        pytest.param(PARTLY, False, 0, id="one class renamed"),
        pytest.param(PARTLY[::-1], True, 11, id="one class renamed, load_classes_by_name"),
        pytest.param(OTHERS, True, 0, id="all classes renamed, load_classes_by_name"),
        pytest.param([str(k) for k in range(12)], False, 12, id="numbers as names"),
    ],
)
def test_classifier_rows_of_loaded_weights_are_matched_by_name(
    trained: tuple[str, float],
    tiny: dict[str, Any],
    described: Path,
    caplog: pytest.LogCaptureFixture,
    names: list[str],
    by_name: bool,
    num_loaded: int,
) -> None:
    path, _ = trained
    config = on(tiny, reordered(described, names), load_path=path, load_weights_only=True)
    config |= {"load_classes_by_name": by_name, "max_duration": "1ba"}
    config["optimizer"] = {"lr": 1e-30, "weight_decay": 0}
    rows = main(config).state.model.module.state_dict()[LAYER]
    theirs = load_weights(path).state[LAYER]
    place = {name: NAMES.index(name) if name in NAMES else k for k, name in enumerate(names)}
    same = [torch.equal(rows[k], theirs[place[name]]) for k, name in enumerate(names)]
    assert sum(same) == num_loaded
    is_logged = "classifier.conv_seg: classes " in caplog.text
    assert is_logged == (names != [str(k) for k in range(12)])


def test_load_classes_by_name_rejects_weights_without_names(
    trained: tuple[str, float], tiny: dict[str, Any], described: Path, tmp_path: Path
) -> None:
    unnamed = tmp_path / "unnamed.safetensors"
    save_weights(unnamed, load_weights(trained[0]).state)
    config = on(tiny, described, load_path=str(unnamed), load_weights_only=True)
    with pytest.raises(ConfigError, match=r"unnamed.safetensors does not name its classes"):
        main({**config, "load_classes_by_name": True})


def test_both_classifiers_of_lraspp_are_matched_by_class_name(
    tiny: dict[str, Any], described: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = on(tiny, described, max_duration="1ba", save_folder=str(tmp_path))
    config["model"] = {"name": "torchvision:lraspp_mobilenet_v3_large", "backbone_weights": None}
    main(config).close()
    path = str(tmp_path / "latest-rank0.pt")
    config |= {"data": reordered(described, REVERSED), "save_folder": None}
    config |= {"load_path": path, "is_train": False}
    state = main(config).state.model.module.state_dict()
    theirs = load_weights(path).state
    for layer in ("low_classifier", "high_classifier"):
        name = f"classifier.{layer}.weight"
        (ours,) = (tensor for key, tensor in state.items() if key.endswith(name))
        assert torch.equal(ours, theirs[name].flip(0))
        assert f"classifier.{layer}: classes in another order, matched by name" in caplog.text


def test_shards_keep_class_order_of_their_description(
    trained: tuple[str, float],
    tiny: dict[str, Any],
    described: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, miou = trained
    shards = str(tmp_path / "shards")
    convert(reordered(described, REVERSED), shards, workers=1)
    # evaluate.py matches the classes of shards by name.
    assert score(path, "--path", shards, folder=tmp_path)["mIoU"] == pytest.approx(miou, abs=1e-4)
    # The labels in shards are fixed, so a run rejects a different class order.
    config = on(tiny, described)
    for section in ("train_dataset", "eval_dataset"):
        config[section] |= {"path": shards, "is_streaming": True}
    for split in ("train", "val"):
        with pytest.raises(ClassError, match=r"description.yaml: class 0 is plane, .* it is sky"):
            build_data(resolve(config), split)
    build_data(resolve({**config, "data": reordered(described, REVERSED)}), "val")


def test_class_names_file_may_translate_but_not_reorder_names(
    trained: tuple[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, translated = tmp_path / "names.txt", tmp_path / "translated.txt"
    names.write_text("\n".join(REVERSED))
    translated.write_text("\n".join(f"Klasse {name}" for name in NAMES))
    with pytest.raises(ClassError, match=r"names.txt: class 0 is plane, but in .* it is sky; give"):
        Segmenter(trained[0], classes=str(names))
    arguments = [trained[0], "--weights-only", "--out", str(tmp_path / "out.safetensors")]
    assert export.main([*arguments, "--classes", str(names)]) == 2
    assert "names.txt: class 0 is plane" in capsys.readouterr().err
    assert export.main([*arguments, "--classes", str(translated)]) == 0


@pytest.mark.parametrize("is_same_set", [True, False])
def test_evaluate_compares_ignore_background_with_the_run(
    tiny: dict[str, Any],
    synthetic: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    is_same_set: bool,
) -> None:
    caplog.set_level(logging.WARNING)
    tiny["model"]["num_classes"] = 13
    for section in ("train_dataset", "eval_dataset"):
        tiny[section]["ignore_background"] = False
    main({**tiny, "save_folder": str(tmp_path), "max_duration": "1ba"}).close()
    other = tmp_path / "other"
    other.symlink_to(Path(synthetic).resolve())
    path = synthetic
    if not is_same_set:
        path = str(tmp_path / "copy")
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/images").symlink_to(Path(synthetic, "ADEChallengeData2016/images"))
        masks = Path(synthetic, "ADEChallengeData2016/annotations")
        (tmp_path / "copy/annotations").symlink_to(masks)
    status = evaluate.main([str(tmp_path), "--path", path, "--ignore-background"])
    line = "ignore_background is true, but the run used false"
    if is_same_set:
        assert status == 2 and line in capsys.readouterr().err
    else:
        assert status == 0 and line in caplog.text
