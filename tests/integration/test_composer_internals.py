"""Composer's private names that the project uses still mean what the project expects."""

from __future__ import annotations

from typing import Any

import pytest

from training.composer_internals import train_data_spec

pytestmark = pytest.mark.usefixtures("small_network")


def test_train_data_spec_returns_trainers_data_spec(tiny: dict[str, Any]) -> None:
    import main
    from training.config import resolve

    trainer = main.build_trainer(resolve(tiny))
    assert train_data_spec(trainer).dataloader is trainer.state.train_dataloader
    trainer.close()
