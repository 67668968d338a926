"""Tests of training/keys.py."""

from __future__ import annotations

from omegaconf import OmegaConf

from tests.support.paths import ROOT
from training import config

YAMLS = ROOT / "yamls"


def test_help_lists_every_key_of_the_yaml() -> None:
    lines = config.help_text()
    for section, values in OmegaConf.to_container(OmegaConf.load(YAMLS / "deeplabv3.yaml")).items():
        names = values if isinstance(values, dict) and section != "loggers" else [None]
        for name in names:
            assert f"\n  {section}{f'.{name}' if name else ''}" in lines
