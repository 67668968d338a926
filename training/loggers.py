"""Where a run's numbers go: Composer's loggers, by the names that the YAML has for them."""

from __future__ import annotations

import os

from composer import loggers
from composer.loggers import LoggerDestination

from errors import ConfigError, one_line
from training.schema import Config


def build_loggers(config: Config) -> list[LoggerDestination]:
    """Build the loggers of the YAML.

    The progress bar and the console are the Trainer's: of those, only the arguments are tried.

    Raises:
        ConfigError: A logger does not take its arguments.
    """
    classes = {
        "progress_bar": loggers.ProgressBarLogger,
        "console": loggers.ConsoleLogger,
        "file": loggers.FileLogger,
        "wandb": loggers.WandBLogger,
        "tensorboard": loggers.TensorboardLogger,
        "mlflow": loggers.MLFlowLogger,
        "comet_ml": loggers.CometMLLogger,
        "neptune": loggers.NeptuneLogger,
    }
    if "wandb" in config.loggers:
        # Offline, W&B 0.18 otherwise asks its server about every table and waits for the answer.
        os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
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


def _make_folder(filename: str) -> None:
    """Make the folder of the file logger's file, which it does not do itself."""
    folder = os.path.dirname(filename)
    if folder and "{" not in folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"loggers.file.filename: {one_line(error)}") from error
