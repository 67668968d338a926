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


def test_deeplabv3_yaml_holds_the_references_numbers(tmp_path: Path) -> None:
    (tmp_path / "ADEChallengeData2016" / "images" / "training").mkdir(parents=True)
    (tmp_path / "ADEChallengeData2016" / "images" / "validation").mkdir()
    paths = [f"train_dataset.path={tmp_path}", f"eval_dataset.path={tmp_path}"]
    typed = resolve(load(str(YAMLS / "deeplabv3.yaml"), paths))
    assert (typed.max_duration, typed.seed, typed.train_dataset.batch_size) == ("128ep", 17, 128)
    assert (typed.optimizer.lr, typed.optimizer.momentum) == (0.08, 0.9)
    assert typed.optimizer.weight_decay == 5e-5
    assert (typed.model.cross_entropy_weight, typed.model.dice_weight) == (0.375, 1.125)
    assert (typed.medium.sam.rho, typed.medium.sam.interval, typed.medium.mixup.alpha) == (
        0.3,
        2,
        0.2,
    )
    assert (typed.hot.sam.rho, typed.hot.sam.interval, typed.hot.mixup.alpha) == (0.3, 1, 0.5)
    assert (typed.mild.ema.half_life, typed.mild.ema.update_interval) == ("1000ba", "10ba")
    assert (typed.hot.ema.half_life, typed.hot.ema.update_interval) == ("2000ba", "1ba")
    # What the YAML spells out is what a config without the key means.
    spelled_out = OmegaConf.to_container(OmegaConf.load(YAMLS / "deeplabv3.yaml"))
    data = {"path": str(tmp_path)}
    defaults = resolve({"train_dataset": data, "eval_dataset": data})
    for section, values in spelled_out.items():
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
    ours, plain = resolve(load(words[4], words[5:])), load(words[4], [])
    shards = {"is_streaming": True, "path": "s3://my-bucket/ade20k", "local": "/tmp/ade20k"}
    for section in ("train_dataset", "eval_dataset"):
        plain[section] |= shards
    assert ours == resolve(plain)


def test_the_other_yamls_fit_the_schema(synthetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(YAMLS.parent)
    paths = [f"{section}.path={synthetic}" for section in ("train_dataset", "eval_dataset")]
    for name in ("demo.yaml", "camvid.yaml", "camvid_lite0.yaml"):
        assert resolve(load(str(YAMLS / name), paths)).run_name == name.removesuffix(".yaml")
