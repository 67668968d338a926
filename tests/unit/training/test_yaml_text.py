"""Tests of training/yaml_text.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from dataset.description import parse_description, read_description
from errors import ConfigError
from tests.support.paths import ROOT
from training.config import load, resolve

TEXTS = ["007", "0123", "12:30", "2024_05_01", "1e5", "no", "On", "1_0", "0x1F", "3.0", "it's"]


def config_with(tmp_path: Path, text: str, overrides: list[str]) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return resolve(load(str(path), overrides), with_data=False)


@pytest.mark.parametrize("text", TEXTS)
def test_run_name_is_read_exactly_as_written(tmp_path: Path, text: str) -> None:
    assert config_with(tmp_path, f"run_name: {text}  # a name\n", []).run_name == text
    assert config_with(tmp_path, "seed: 1\n", [f"run_name={text}"]).run_name == text
    assert config_with(tmp_path, f"{{seed: 1, run_name: &a {text}}}\n", []).run_name == text
    quoted = text.replace("'", "''")
    assert config_with(tmp_path, f"run_name: '{quoted}'\n", []).run_name == text


def test_class_names_and_tags_are_read_as_text(tmp_path: Path) -> None:
    text = """
    model: {class_weights: {no: 2.0, 007: 1, 12:30: 3}, num_classes: 3}
    loggers:
      wandb: {project: 1e5, tags: [no, 007], init_kwargs: {group: 12:30}}
      mlflow: {tags: {run: 0123}}
      file: {flush_interval: 3}
    """
    for config in (
        config_with(tmp_path, text, []),
        config_with(tmp_path, text, ["loggers.wandb.tags=[no,007]", "loggers.wandb.project=1e5"]),
    ):
        assert config.model.class_weights == {"no": 2.0, "007": 1, "12:30": 3}
        wandb = config.loggers["wandb"]
        assert (wandb["project"], wandb["tags"]) == ("1e5", ["no", "007"])
        assert wandb["init_kwargs"] == {"group": "12:30"}
        assert config.loggers["mlflow"] == {"tags": {"run": "0123"}}
        assert config.loggers["file"] == {"flush_interval": 3}


def test_class_names_of_a_description_are_read_as_text(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(
        "train: &train {images: a, masks: b}\n"
        "val: {<<: *train, list: val.txt}\n"
        "classes: {no: {labels: [1]}, 007: {labels: [2]}, 12:30: {labels: [3]}}\n"
    )
    description = parse_description(read_description(str(path)))
    assert [info.name for info in description.classes] == ["no", "007", "12:30"]
    assert description.sources["val"].images == "a"
    path.write_text("classes: {no: {labels: [1]}, no: {labels: [2]}}")
    with pytest.raises(ConfigError, match="duplicate key no"):
        read_description(str(path))


@pytest.mark.parametrize(
    "line",
    ["seed: 017", "train_dataset: {batch_size: 08}", "seed: 1:30", "optimizer: {lr: 1:30.5}"]
    + ["loggers: {file: {flush_interval: 010}}", "hot: {sam: {interval: 02}}"],
)
def test_ambiguous_yaml_number_is_rejected(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"YAML reads .* as a different number; write it without"):
        config_with(tmp_path, line, [])
    key, _, rest = line.partition(": ")
    with pytest.raises(ConfigError, match=r"YAML reads .* as a different number; write it without"):
        config_with(tmp_path, "run_name: a", [f"{key}={rest}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("0.010", 0.01), ("1E-3", 1e-3), ("5.0e-2", 0.05), ("0.5", 0.5)],
)
def test_valid_yaml_numbers_are_read_as_numbers(tmp_path: Path, text: str, value: float) -> None:
    assert config_with(tmp_path, f"optimizer: {{lr: {text}}}", []).optimizer.lr == value
    assert config_with(tmp_path, "seed: 0", [f"optimizer.lr={text}"]).optimizer.lr == value
    assert config_with(tmp_path, "run_name:\nseed: 0", []).run_name is None
    assert config_with(tmp_path, "run_name: x", ["run_name=null"]).run_name is None


def test_paths_are_resolved_against_working_directory_home_and_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = folder / "names.txt"
    names.write_text("a\nb\n")
    text = "{model: {num_classes: 2}, class_names: names.txt, save_folder: ~/runs}"
    config = config_with(folder, text, [])
    assert config.class_names == str(names)
    assert config.save_folder == f"{tmp_path}/runs"
    (elsewhere / "names.txt").write_text("c\nd\n")
    assert config_with(folder, text, []).class_names == "names.txt"
    assert config_with(folder, "save_folder: runs", []).save_folder == "runs"
    with pytest.raises(
        ConfigError, match=rf"cannot find none.txt, relative to {elsewhere} or to the"
    ):
        config_with(folder, "{model: {num_classes: 2}, class_names: none.txt}", [])


@pytest.mark.parametrize("path", sorted(ROOT.glob("yamls/*.yaml")), ids=str)
def test_shipped_yamls_work_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    # mcloud_run.yaml is a job file, and own.yaml needs a path from the user.
    if path.name in ("mcloud_run.yaml", "own.yaml"):
        return
    monkeypatch.chdir(tmp_path)
    config = resolve(load(str(path), []), with_data=False)
    assert config.class_names is None or Path(config.class_names).is_file()


def test_config_of_the_caller_is_not_modified(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import main

    seen = []

    def build(config: Any, **_: Any) -> None:
        config.optimizer.lr = 5.0
        config.loggers["console"] = {}
        seen.append(config)
        raise KeyError

    monkeypatch.setattr(main, "build_trainer", build)
    tiny["loggers"] = {"file": {"filename": "log"}}
    before = copy.deepcopy(tiny)
    for config in (tiny, OmegaConf.create(tiny), resolve(copy.deepcopy(tiny))):
        original = copy.deepcopy(config)
        with pytest.raises(KeyError):
            main.main(config)
        assert config == original
    assert tiny == before
    assert yaml.safe_dump(tiny) == yaml.safe_dump(before)
