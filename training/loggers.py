"""Composer's loggers by their YAML names; if a logger fails, the error is reported in one line.

A logger for an external service can fail to start for many reasons, such as a missing key, an
unreachable server, an incompatible store or incompatible packages. Each failure is reported as a
one-line error before training starts.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from composer import Trainer, loggers
from composer.core import State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from errors import ConfigError, one_line
from training.config import class_infos
from training.schema import Config

if TYPE_CHECKING:
    from checkpointing.resume import Start

log = logging.getLogger(__name__)

# Advice for the user if a logger fails to start although its arguments are valid.
REMEDIES = {
    "file": "check filename",
    "wandb": "run `wandb login`, or set WANDB_MODE=offline",
    "tensorboard": "check log_dir",
    "mlflow": "check tracking_uri and that its server runs",
    "comet_ml": "set COMET_API_KEY, and check the network",
    "neptune": "set NEPTUNE_API_TOKEN, and check the network, or use mode: offline",
}
# Logger methods that Composer calls before the first training step.
STARTING = ("init", "after_load", "log_hyperparameters")
# Error messages quote at most this many characters of a logger's own error.
MAX_REASON = 240


class FileLogger(loggers.FileLogger):
    """A version of Composer's FileLogger that appends to the existing file when a run resumes.

    Composer's own FileLogger always truncates the file, even with `overwrite=False`.

    Args:
        overwrite: Whether to truncate the file instead of appending to it.
        **arguments: Arguments of Composer's FileLogger.
    """

    def __init__(self, overwrite: bool = False, **arguments: Any) -> None:
        every = arguments.get("flush_interval", 1)
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"flush_interval: {every!r} must be an integer of at least 1")
        super().__init__(**arguments)
        self.mode: Literal["w+", "a+"] = "w+" if overwrite else "a+"

    def init(self, state: State, logger: Logger) -> None:
        """Open the file, and write the lines that were logged before it was opened."""
        self._run_name = state.run_name
        os.makedirs(os.path.dirname(self.filename) or ".", exist_ok=True)
        self.file = open(self.filename, self.mode, buffering=self.buffer_size)  # noqa: SIM115
        self._flush_queue()


class WandBLogger(loggers.WandBLogger):
    """A version of Composer's WandBLogger that lets a resumed run continue its W&B run.

    Args:
        server_run: ID of the W&B run to continue, or None.
        **arguments: Arguments of Composer's WandBLogger.
    """

    def __init__(self, server_run: str | None = None, **arguments: Any) -> None:
        if server_run is not None:
            own = arguments.get("init_kwargs") or {}
            arguments["init_kwargs"] = {"id": server_run, "resume": "allow", **own}
        # Without this setting, W&B 0.18 waits for its server each time a table is logged, even in
        # offline mode.
        os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
        super().__init__(**arguments)
        import wandb

        # Composer 0.32 calls this method, which wandb 0.31 lacks.
        wandb.Run.get_url = lambda run: run.url  # pyrefly: ignore[bad-assignment]

    @property
    def server_run(self) -> str | None:
        """The ID of the W&B run, or None before it has started."""
        import wandb

        return wandb.run.id if wandb.run is not None else None

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Log the config, and allow a resumed run to change its values."""
        if self._enabled:
            import wandb

            wandb.config.update(hyperparameters, allow_val_change=True)


class MLFlowLogger(loggers.MLFlowLogger):
    """A version of Composer's MLFlowLogger that lets a resumed run continue its MLflow run.

    The `resume` option of Composer's logger is not enough, because it continues any run with the
    same name.

    Args:
        server_run: ID of the MLflow run to continue, or None.
        **arguments: Arguments of Composer's MLFlowLogger.
    """

    def __init__(self, server_run: str | None = None, **arguments: Any) -> None:
        # Allow local folders such as mlruns, which MLflow 3 still supports but rejects by default.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        super().__init__(**arguments)
        self._resumed: dict[str, str] = {}  # Parameters already recorded in the resumed MLflow run.
        self._to_resume = server_run

    @property
    def server_run(self) -> str | None:
        """The ID of the MLflow run, or None before it has started."""
        return self._run_id

    def init(self, state: State, logger: Logger) -> None:
        """Start a new MLflow run, or continue the run that the checkpoint names."""
        variable = "MLFLOW_RUN_ID"  # Environment variable that Composer and MLflow read.
        run, resumed = self._to_resume, None
        if self._enabled and run is not None and variable not in os.environ:
            resumed = self._parameters_of(run)
            if resumed is None:
                log.warning("loggers.mlflow: run %s no longer exists, so a new run starts", run)
        if run is None or resumed is None:
            super().init(state, logger)
            return
        self._resumed = resumed
        os.environ[variable] = run
        try:
            super().init(state, logger)
        finally:
            del os.environ[variable]

    def _parameters_of(self, run: str) -> dict[str, str] | None:
        """Return the parameters of an MLflow run, or None if the run does not exist."""
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
        """Log the config except changed values, because MLflow cannot change a parameter."""
        kept = [k for k, v in hyperparameters.items() if self._resumed.get(k, str(v)) != str(v)]
        if kept:
            log.warning(
                "loggers.mlflow: MLflow cannot change parameters, so it keeps the first value "
                "of %s",
                ", ".join(kept),
            )
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
    """Return the Trainer arguments that the config sets, including those for the console."""
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
    """Send the config of a run to its loggers, except to the progress bar.

    Args:
        trainer: Trainer of the run.
        config: Config of the run.
        weights: Weights of the classes in the loss, or None.
    """
    trainer.logger.log_hyperparameters(asdict(config))
    if weights is not None:
        from training.class_weights import named

        line = named(weights, class_infos(config))
        trainer.logger.log_hyperparameters({"class_weights": line})
    for destination in trainer.logger.destinations:
        if isinstance(destination, loggers.ProgressBarLogger):
            # The config has about a hundred lines, so do not print it above the progress bar.
            destination.hparams_already_logged_to_console = True


def build_loggers(config: Config, start: Start | None) -> list[LoggerDestination]:
    """Build the loggers that the config enables.

    For the progress bar and the console, only the arguments are checked, because the Trainer builds
    these two loggers itself.

    Args:
        config: Config of the run.
        start: Checkpoint from which the run starts, or None. A resumed run continues its W&B and
            MLflow runs.

    Raises:
        ConfigError: A logger does not accept its arguments, or cannot start.
    """
    built, server_runs = [], start.server_runs(config.run_name) if start else {}
    for name, arguments in config.loggers.items():
        # The checkpoint stores only the IDs of the first rank's W&B and MLflow runs, so all other
        # ranks start new runs.
        resumed = server_runs.get(name) if dist.get_global_rank() == 0 else None
        more = {} if resumed is None else {"server_run": resumed}
        with explained(name):
            logger = CLASSES[name](**arguments, **more)
        for step in STARTING:
            setattr(logger, step, explained(name)(getattr(logger, step)))
        if name not in ("progress_bar", "console"):
            built.append(logger)
    return built


def server_runs_of(built: Sequence[LoggerDestination]) -> dict[str, str]:
    """Return the IDs of the W&B and MLflow runs that loggers write to, by logger name."""
    runs = {}
    for logger in built:
        if isinstance(logger, WandBLogger | MLFlowLogger) and logger.server_run is not None:
            runs["wandb" if isinstance(logger, WandBLogger) else "mlflow"] = logger.server_run
    return runs


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn any logger error into a ConfigError that says what to do; also works as a decorator.

    Args:
        name: Name of the logger in the YAML.
    """
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"loggers.{name}: {_reason(error)}; check its arguments") from error
    except ImportError as error:
        raise ConfigError(
            f"loggers.{name}: its packages are incompatible ({_reason(error)}); run "
            f"make install WITH={name}"
        ) from error
    except Exception as error:  # W&B, MLflow and the other services raise different exceptions.
        raise ConfigError(f"loggers.{name}: {_reason(error)}; {REMEDIES[name]}") from error


def _reason(error: Exception) -> str:
    text = one_line(error).rstrip(".")
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]} ..."
