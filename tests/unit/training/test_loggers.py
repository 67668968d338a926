"""Tests of training/loggers.py."""

from __future__ import annotations

from typing import Any

import pytest
from composer import loggers

from errors import ConfigError
from main import main
from tests.support.loggers import Failing, ServiceError
from training import loggers as loggers_module
from training.config import resolve
from training.loggers import WandBLogger, build_loggers

pytestmark = pytest.mark.usefixtures("small_network")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        pytest.param(
            ImportError("cannot import name 'A' from 'sqlalchemy.pool'"),
            r"its packages are incompatible \(cannot import .*\); run make install WITH=mlflow",
            id="incompatible package",
        ),
        pytest.param(ValueError("no 'x'"), "no 'x'; check its arguments", id="invalid argument"),
        pytest.param(
            OSError(13, "Permission denied", "/a"),
            "Permission denied: '/a'; ",
            id="permission denied",
        ),
        pytest.param(
            ServiceError("x" * 2000), r"x{240} \.\.\.; check tracking_uri", id="long message"
        ),
    ],
)
def test_logger_error_says_what_to_do(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, error: Exception, line: str
) -> None:
    monkeypatch.setitem(
        loggers_module.CLASSES, "mlflow", lambda **kwargs: Failing("__init__", error)
    )
    config = resolve({**tiny, "loggers": {"mlflow": {"tracking_uri": "x"}}})
    with pytest.raises(ConfigError, match=rf"^loggers\.mlflow: .*{line}"):
        build_loggers(config, None)


def test_user_supplied_wandb_run_id_takes_precedence() -> None:
    logger = WandBLogger(server_run="old", init_kwargs={"id": "mine"})
    assert logger._init_kwargs["id"] == "mine"
    assert isinstance(logger, loggers.WandBLogger)


def test_error_names_the_logger_with_an_invalid_argument(tiny: dict[str, Any]) -> None:
    tiny["loggers"] = {"tensorboard": {"directory": "x"}}
    with pytest.raises(ValueError, match=r"loggers.tensorboard: .*directory"):
        main(tiny)
    for name, arguments in (
        ("progress_bar", {"colour": "red"}),
        ("console", {"log_interval": "often"}),
        ("file", {"filename": 3}),
        ("file", {"flush_interval": "1ba"}),
    ):
        tiny["loggers"] = {name: arguments}
        with pytest.raises(ConfigError, match=rf"loggers\.{name}: "):
            main(tiny)
    tiny["loggers"] = {"file": {"filename": __file__ + "/logs/log.txt"}}
    with pytest.raises(ConfigError, match=r"loggers.file: .*Not a directory.*; check filename"):
        main(tiny)
