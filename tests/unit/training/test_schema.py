"""Tests of training/schema.py."""

from __future__ import annotations

import shlex
import string
from pathlib import Path

import pytest
from mcli import RunConfig
from omegaconf import OmegaConf

from tests.support.paths import ROOT
from training.config import load, resolve

YAMLS = ROOT / "yamls"


def test_deeplabv3_yaml_matches_the_reference_settings(tmp_path: Path) -> None:
    (tmp_path / "ADEChallengeData2016" / "images" / "training").mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "images" / "validation").mkdir()
    paths = [f"train_dataset.path={tmp_path}", f"eval_dataset.path={tmp_path}"]
    config = resolve(load(str(YAMLS / "deeplabv3.yaml"), paths))
    assert (config.max_duration, config.seed, config.train_dataset.batch_size) == ("128ep", 17, 128)
    assert (config.optimizer.lr, config.optimizer.momentum) == (0.08, 0.9)
    assert config.optimizer.weight_decay == 5e-5
    assert (config.model.cross_entropy_weight, config.model.dice_weight) == (0.375, 1.125)
    assert (config.medium.sam.rho, config.medium.sam.interval, config.medium.mixup.alpha) == (
        0.3,
        2,
        0.2,
    )
    assert (config.hot.sam.rho, config.hot.sam.interval, config.hot.mixup.alpha) == (0.3, 1, 0.5)
    assert (config.mild.ema.half_life, config.mild.ema.update_interval) == ("1000ba", "10ba")
    assert (config.hot.ema.half_life, config.hot.ema.update_interval) == ("2000ba", "1ba")
    # The YAML's values equal the defaults of a config without these keys.
    explicit = OmegaConf.to_container(OmegaConf.load(YAMLS / "deeplabv3.yaml"))
    data = {"path": str(tmp_path)}
    defaults = resolve({"train_dataset": data, "eval_dataset": data})
    for section, values in explicit.items():
        if section in ("loggers", "train_dataset", "eval_dataset"):
            continue
        default = getattr(defaults, section)
        if isinstance(values, dict):
            default = OmegaConf.to_container(OmegaConf.structured(default))
            default = {name: default[name] for name in values}
        assert values == default, section


def test_mcloud_run_trains_deeplabv3_yaml_on_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunConfig.from_file(str(YAMLS / "mcloud_run.yaml"))
    monkeypatch.chdir(YAMLS.parent)
    words = shlex.split(
        string.Template(run.command.replace("\\\n", "")).substitute(run.env_variables)
    )
    assert words[:4] == ["cd", "deeplab", "composer", "main.py"]
    assert words[4] == "yamls/deeplabv3.yaml"
    ours, expected = resolve(load(words[4], words[5:])), load(words[4], [])
    shards = {"is_streaming": True, "path": "s3://my-bucket/ade20k", "local": "/tmp/ade20k"}
    for section in ("train_dataset", "eval_dataset"):
        expected[section] |= shards
    assert ours == resolve(expected)


def test_other_yamls_match_the_schema(synthetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(YAMLS.parent)
    paths = [f"{section}.path={synthetic}" for section in ("train_dataset", "eval_dataset")]
    for name in ("demo.yaml", "camvid.yaml", "camvid_lite0.yaml"):
        assert resolve(load(str(YAMLS / name), paths)).run_name == name.removesuffix(".yaml")
