"""The loggers of a run: Composer's, by their names in the YAML, and what happens if one fails.

A logger of somebody else's service can fail in many ways as it starts: no key, no server, a store
of another version, packages that do not fit together. Each becomes one line, before training.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from types import MappingProxyType
from typing import Any, Literal

from composer import Trainer, loggers
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from errors import ConfigError, one_line
from training.config import class_infos
from training.schema import Config

log = logging.getLogger(__name__)

# What a user can do if a logger does not start although its arguments are right.
REMEDIES = {
    "file": "check filename",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "tensorboard": "check log_dir",
    "mlflow": "check tracking_uri and that its server runs",
    "comet_ml": "set COMET_API_KEY, and check the network",
    "neptune": "set NEPTUNE_API_TOKEN, and check the network, or use mode: offline",
}
# Composer calls these before the first step.
STARTING = ("init", "after_load", "log_hyperparameters")
MAX_REASON = 240  # characters


class FileLogger(loggers.FileLogger):
    """Composer's FileLogger, except that a resumed run adds to its file.

    Composer's own always begins the file anew, whatever `overwrite` says.

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


class WandBLogger(loggers.WandBLogger):
    """Composer's WandBLogger, except that a resumed run goes on in the same W&B run.

    Args:
        server_run: ID of the W&B run to go on with, or None.
        **arguments: Composer's.
    """

    def __init__(self, server_run: str | None = None, **arguments: Any) -> None:
        if server_run is not None:
            own = arguments.get("init_kwargs") or {}
            arguments["init_kwargs"] = {"id": server_run, "resume": "allow", **own}
        super().__init__(**arguments)

    @property
    def server_run(self) -> str | None:
        """ID of the W&B run, once it has begun."""
        import wandb

        return wandb.run.id if wandb.run is not None else None

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the config; a resumed run may have changed a value."""
        if self._enabled:
            import wandb

            wandb.config.update(hyperparameters, allow_val_change=True)


class MLFlowLogger(loggers.MLFlowLogger):
    """Composer's MLFlowLogger, except that a resumed run goes on in the same MLflow run.

    Composer's own `resume` goes on with any run of the same name.

    Args:
        server_run: ID of the MLflow run to go on with, or None.
        **arguments: Composer's.
    """

    def __init__(self, server_run: str | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._resumed: dict[str, str] = {}  # parameters of the run that goes on
        self._to_resume = server_run

    @property
    def server_run(self) -> str | None:
        """ID of the MLflow run, once it has begun."""
        return self._run_id

    def init(self, state: State, logger: Logger) -> None:
        """Begin a run, or go on with one."""
        variable = "MLFLOW_RUN_ID"  # by which Composer and MLflow are told of a run
        if not self._enabled or self._to_resume is None or variable in os.environ:
            super().init(state, logger)
            return
        resumed = self._parameters_of(self._to_resume)
        if resumed is None:
            log.warning("loggers.mlflow: run %s is gone; a new one begins", self._to_resume)
            super().init(state, logger)
            return
        self._resumed = resumed
        os.environ[variable] = self._to_resume
        try:
            super().init(state, logger)
        finally:
            del os.environ[variable]

    def _parameters_of(self, run: str) -> dict[str, str] | None:
        """Return what a run has as its parameters, or None if it is deleted or not there."""
        from mlflow.exceptions import MlflowException

        try:
            record = self._mlflow_client.get_run(run)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        is_deleted = record.info.lifecycle_stage == "deleted"
        return None if is_deleted else dict(record.data.params)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the config. MLflow cannot change a parameter, so it keeps the first run's value."""
        kept = [k for k, v in hyperparameters.items() if self._resumed.get(k, str(v)) != str(v)]
        if kept:
            log.warning("loggers.mlflow keeps the first value of %s", ", ".join(kept))
        super().log_hyperparameters({k: v for k, v in hyperparameters.items() if k not in kept})


CLASSES: dict[str, Callable[..., LoggerDestination]] = {
    "progress_bar": loggers.ProgressBarLogger,
    "console": loggers.ConsoleLogger,
    "file": FileLogger,
    "wandb": WandBLogger,
    "tensorboard": loggers.TensorboardLogger,
    "mlflow": MLFlowLogger,
    "comet_ml": loggers.CometMLLogger,
    "neptune": loggers.NeptuneLogger,
}


def trainer_options(config: Config) -> dict[str, Any]:
    """Return the Trainer's arguments that are keys of the config, and those of the console."""
    options = {**config.loggers.get("progress_bar", {}), **config.loggers.get("console", {})}
    return {
        "seed": config.seed,
        "deterministic_mode": config.deterministic,
        "python_log_level": config.python_log_level,
        "progress_bar": "progress_bar" in config.loggers,
        "log_to_console": "console" in config.loggers,
        "console_stream": options.get("stream", "stderr"),
        "console_log_interval": options.get("log_interval", "1ba"),
        "log_traces": options.get("log_traces", False),
    }


def log_config(trainer: Trainer, config: Config, weights: Sequence[float] | None) -> None:
    """Send a run's config to its loggers, but not to the progress bar.

    Args:
        trainer: The run's.
        config: The run's.
        weights: The weights of the classes in its loss, or None.
    """
    trainer.logger.log_hyperparameters(asdict(config))
    if weights is not None:
        from training.class_weights import named

        line = named(weights, class_infos(config))
        trainer.logger.log_hyperparameters({"class_weights": line})
    for destination in trainer.logger.destinations:
        if isinstance(destination, loggers.ProgressBarLogger):
            destination.hparams_already_logged_to_console = True  # a hundred lines before the bar


def build_loggers(
    config: Config, server_runs: Mapping[str, str] = MappingProxyType({})
) -> list[LoggerDestination]:
    """Build the loggers of the YAML; a failure to start any of them is a ConfigError.

    The progress bar and the console are the Trainer's: of those, only the arguments are tried.

    Args:
        config: The run's.
        server_runs: Runs of W&B and MLflow to go on with, as `server_runs_of` returns them.

    Raises:
        ConfigError: A logger does not take its arguments, or cannot start.
    """
    if "wandb" in config.loggers:
        # Offline, W&B 0.18 otherwise asks its server about every table and waits for the answer.
        os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
        _restore_get_url()
    if "mlflow" in config.loggers:
        # MLflow 3 refuses folders such as mlruns, which it still reads and writes.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    built = []
    for name, arguments in config.loggers.items():
        # The checkpoint names the first process's run; the others begin their own.
        resumed = server_runs.get(name) if dist.get_global_rank() == 0 else None
        more = {} if resumed is None else {"server_run": resumed}
        with explained(name):
            logger = CLASSES[name](**arguments, **more)
        for step in STARTING:
            setattr(logger, step, _explaining(name, getattr(logger, step)))
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


def server_runs_of(built: Sequence[LoggerDestination]) -> dict[str, str]:
    """Return the IDs of the runs that loggers write to on a server, by the loggers' names."""
    runs = {}
    for logger in built:
        if isinstance(logger, WandBLogger | MLFlowLogger) and logger.server_run is not None:
            runs["wandb" if isinstance(logger, WandBLogger) else "mlflow"] = logger.server_run
    return runs


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Within, whatever a logger raises becomes a ConfigError that says what to do.

    Args:
        name: The logger's name in the YAML.
    """
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"loggers.{name}: {_reason(error)}; check its arguments") from error
    except ImportError as error:
        raise ConfigError(
            f"loggers.{name}: its packages do not fit together ({_reason(error)}); "
            f"make install WITH={name}"
        ) from error
    except Exception as error:  # a service's client has errors of its own
        raise ConfigError(f"loggers.{name}: {_reason(error)}; {REMEDIES[name]}") from error


def _explaining(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method of a logger with its errors explained."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with explained(name):
            return method(*args, **kwargs)

    return call


def _reason(error: Exception) -> str:
    text = one_line(error).rstrip(".")
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
