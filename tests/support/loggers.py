"""A logger that raises an error like a failing external service."""

from __future__ import annotations

from typing import Any

from composer.core import State
from composer.loggers import Logger, LoggerDestination


class Failing(LoggerDestination):
    """A logger for an external service that fails at a given step."""

    def __init__(self, step: str, error: Exception) -> None:
        self.step, self.error = step, error
        self._fail("__init__")

    def _fail(self, step: str) -> None:
        if step == self.step:
            raise self.error

    def init(self, state: State, logger: Logger) -> None:
        self._fail("init")

    def after_load(self, state: State, logger: Logger) -> None:
        self._fail("after_load")

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        self._fail("log_hyperparameters")


class ServiceError(Exception):
    """An error that, like those of some client libraries, derives directly from Exception."""
