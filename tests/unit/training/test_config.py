"""Tests of training/config.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from errors import ConfigError
from training.config import load, resolve


@pytest.mark.parametrize(
    ("recipe", "duration"), [("mild", "25ep"), ("medium", "90ep"), ("hot", "240ep")]
)
def test_command_line_duration_overrides_the_recipe_duration(
    tiny: dict[str, Any], tmp_path: Path, recipe: str, duration: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    assert resolve(load(str(path), [])).max_duration == "4ba"
    assert resolve(load(str(path), [f"recipe_name={recipe}"])).max_duration == duration
    overrides = [f"recipe_name={recipe}", "max_duration=2ep"]
    assert resolve(load(str(path), overrides)).max_duration == "2ep"
    overrides = [f"recipe_name={recipe}", f"{recipe}.max_duration=30"]
    assert resolve(load(str(path), overrides)).max_duration == "30ep"


def test_null_on_the_command_line_removes_a_logger(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny | {"loggers": {"progress_bar": {}, "wandb": None}}, path)
    assert resolve(load(str(path), ["loggers.wandb=null"])).loggers == {"progress_bar": {}}
    left_empty = resolve(load(str(path), [])).loggers
    assert left_empty == {"progress_bar": {}, "wandb": {}}


INTERPOLATIONS = {
    "recipe_name=${oc.env:NOPE}": "recipe_name: .*'NOPE' not found",
    "recipe_name=mild max_duration=${mild.nosuch}": "max_duration: .*'mild.nosuch' not found",
    "max_duration=${max_duration} recipe_name=hot": "max_duration: Recursive interpolation",
    "load_path=${oc.env:NOPE}/x.pt": "load_path: .*'NOPE' not found",
    "seed=${nosuch:1}": "seed: Unsupported interpolation type nosuch",
    "seed=${a": "seed: no viable alternative",
    "seed=???": "seed: Missing mandatory value",
}


@pytest.mark.parametrize("overrides", INTERPOLATIONS)
@pytest.mark.parametrize("where", ["override", "file"])
def test_failed_interpolation_gives_a_one_line_error(
    tiny: dict[str, Any], tmp_path: Path, overrides: str, where: str
) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny, path)
    parts = overrides.split()
    if where == "file":
        names = {part.partition("=")[0] for part in parts}
        lines = [line for line in path.read_text().splitlines() if line.split(":")[0] not in names]
        text = "\n".join([*lines, *(part.replace("=", ": ", 1) for part in parts)])
        path.write_text(text)
        parts = []
    with pytest.raises(ConfigError, match=INTERPOLATIONS[overrides]) as caught:
        resolve(load(str(path), parts))
    assert "\n" not in str(caught.value)


def test_run_duration_can_refer_to_a_recipe_setting(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    OmegaConf.save(tiny | {"mild": {"max_duration": "7ep"}}, path)
    overrides = ["recipe_name=mild", "max_duration=${mild.max_duration}"]
    assert resolve(load(str(path), overrides)).max_duration == "7ep"


@pytest.mark.parametrize("text", [None, "a: [1", "- just\n- a list\n"])
def test_invalid_config_file_gives_a_one_line_error(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken.yaml") as caught:
        load(str(path), [])
    assert "\n" not in str(caught.value)
