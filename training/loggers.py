"""Where a run's numbers go: Composer's loggers, by the names that the YAML has for them."""

from __future__ import annotations

import os
from typing import Any, Literal

from composer import loggers
from composer.core import State
from composer.loggers import Logger, LoggerDestination

from errors import ConfigError, one_line
from training.schema import Config


class FileLogger(loggers.FileLogger):
    """Composer's, which adds to a file that an earlier process of the run has begun.

    Composer's own begins it anew, whatever `overwrite` says.

    Args:
        overwrite: Whether to begin it anew.
        **arguments: Composer's.
    """

    def __init__(self, overwrite: bool = False, **arguments: Any) -> None:
        every = arguments.get("flush_interval", 1)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"flush_interval: {every!r} is not 1 or more batches")
        super().__init__(**arguments)
        self.mode: Literal["w+", "a+"] = "w+" if overwrite else "a+"

    def init(self, state: State, logger: Logger) -> None:
        """Open the file and write what was logged before."""
        self._run_name = state.run_name
        os.makedirs(os.path.dirname(self.filename) or ".", exist_ok=True)
        self.file = open(self.filename, self.mode, buffering=self.buffer_size)  # noqa: SIM115
        self._flush_queue()


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Build the loggers of the YAML.

    The progress bar and the console are the Trainer's: of those, only the arguments are tried.

    Raises:
        ConfigError: A logger does not take its arguments.
    """
    classes = {
        "progress_bar": loggers.ProgressBarLogger,
        "console": loggers.ConsoleLogger,
        "file": FileLogger,
        "wandb": loggers.WandBLogger,
        "tensorboard": loggers.TensorboardLogger,
        "mlflow": loggers.MLFlowLogger,
        "comet_ml": loggers.CometMLLogger,
        "neptune": loggers.NeptuneLogger,
    }
    if "wandb" in config.loggers:
        # Offline, W&B 0.18 otherwise asks its server about every table and waits for the answer.
        os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
        _restore_get_url()
    _make_folder(str(config.loggers.get("file", {}).get("filename", "")))
    built = []
    for name, arguments in config.loggers.items():
        try:
            logger = classes[name](**arguments)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"loggers.{name}: {one_line(error)}") from error
        if name not in ("progress_bar", "console"):
            built.append(logger)
    return built


def _restore_get_url() -> None:
    """Give wandb's runs the method that Composer 0.32 calls and wandb 0.31 no longer has."""
    try:
        import wandb
    except ImportError:  # resolve() has already named the group to install
        return
    if not hasattr(wandb.Run, "get_url"):
        setattr(wandb.Run, "get_url", lambda run: run.url)  # noqa: B010 (for pyright)


def _make_folder(filename: str) -> None:
    """Make the folder of the file logger's file, which it does not do itself."""
    folder = os.path.dirname(filename)
    if folder and "{" not in folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"loggers.file.filename: {one_line(error)}") from error
