"""Composer's private attributes that the project uses still exist and work as expected."""

from __future__ import annotations

from typing import Any

import pytest

from training.composer_internals import train_data_spec

pytestmark = pytest.mark.usefixtures("small_network")


def test_train_data_spec_returns_data_spec_of_the_trainer(tiny: dict[str, Any]) -> None:
    import main
    from training.config import resolve

    trainer = main.build_trainer(resolve(tiny))
    assert train_data_spec(trainer).dataloader is trainer.state.train_dataloader
    trainer.close()
