"""A callback that saves checkpoints, from which a run can resume with bit-identical results.

Checkpoints are saved at each interval and when a signal arrives. On SIGTERM, SIGINT (Ctrl-C),
SIGHUP or SIGUSR1, the run finishes the batch in progress, saves a checkpoint and ends. If the same
signal arrives a second time, the run ends immediately.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from composer.callbacks import CheckpointSaver
from composer.core import Event, State, Timestamp
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist, reproducibility
from torch.utils._pytree import tree_iter

from checkpointing.best import Best
from checkpointing.signals import SignalListener
from checkpointing.stores import LocalFolder, NewCheckpoint, batch_of, is_in_folder, outdated
from errors import ConfigError, RunError, Stopped, UserError, one_line
from files import is_remote

if TYPE_CHECKING:
    from checkpointing.remote_store import RemoteFolder

log = logging.getLogger(__name__)

T = TypeVar("T")


def on_first_process(function: Callable[[], T], of_each_node: bool = False) -> T:
    """Call a function on the first rank, and return its result or raise its error on all ranks.

    Args:
        function: Function to call. For an unexpected error, only the message reaches the other
            ranks.
        of_each_node: Whether to call the function once per node, on the node's first rank, which
            then shares the result with the node's other ranks.

    Returns:
        The result of the function.

    Raises:
        UserError, RunError: Raised by the function itself. Other errors become a RunError.
    """
    rank, local_rank = dist.get_global_rank(), dist.get_local_rank()
    result: T | None = None
    failure: Exception | None = None
    if (local_rank if of_each_node else rank) == 0:
        try:
            result = function()
        # The function may raise any exception, so catch all.
        except Exception as error:
            known = isinstance(error, UserError | RunError)
            failure = error if known else RunError(one_line(error))
    outcomes: list[tuple[Any, Exception | None]] = dist.all_gather_object((result, failure))
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return outcomes[rank - local_rank if of_each_node else 0][0]


def open_folder(path: str) -> LocalFolder | RemoteFolder:
    """Open the folder or the object store named by `save_folder`."""
    if not is_remote(path):
        return LocalFolder(path)
    from checkpointing.remote_store import RemoteFolder

    return RemoteFolder(path)


class Evaluations(Protocol):
    """The schedule of a run's evaluations; see `training.callbacks.EvaluationSchedule`."""

    due: bool
    postponed: bool


class Checkpoints(CheckpointSaver):
    """A callback that saves checkpoints at an interval, at the end, and on request.

    If an evaluation is due after the same batch, the checkpoint is saved after the evaluation. If
    the run is asked to stop, it saves the checkpoint at once. The checkpoint then records that the
    evaluation is still due, so that the resumed run evaluates first. With `save_best`, a new best
    evaluation also triggers a checkpoint, which is kept until the score improves again.

    Args:
        folder: Folder or object-store URI.
        save_interval: Time between checkpoints, as a Composer time string.
        evaluations: Schedule of the run's evaluations.
        keep: Number of newest checkpoints to keep; -1 keeps all.
        overwrite: Whether the folder may contain an earlier run's checkpoints, which are then
            removed one by one as new checkpoints are saved.
        autoresume: Whether the run resumes from the checkpoints in the folder.
        best: Tracker of the best evaluation, which also decides on early stopping.
        save_best: Whether to keep the checkpoint of the best evaluation.
        run_name: Name of the run, which the lock on the folder records.

    Attributes:
        saved_checkpoints: Paths of this run's checkpoints, oldest first.
        last: Path of the checkpoint that the run saved last or resumed from, or None.
        own: Names of the checkpoints that pruning may remove. These are checkpoints that this run
            saved, possibly before a resume, or that it replaces because of `overwrite`.
        best_name: Name of the checkpoint that is kept as the best, or None.
        ended: The patience setting with which early stopping ended the run, or None if it did not.
    """

    def __init__(
        self,
        folder: str,
        save_interval: str,
        evaluations: Evaluations,
        keep: int,
        overwrite: bool = False,
        autoresume: bool = False,
        best: Best | None = None,
        save_best: bool = False,
        run_name: str | None = None,
    ):
        periodic = create_interval_scheduler(save_interval)

        def save_due(state: State, event: Event) -> bool:
            # Composer's EMA also calls this function, before the callbacks run, so it must have no
            # side effects.
            return self.evaluations.postponed or self._save_now or periodic(state, event)

        super().__init__(
            ".", remote_file_name=None, latest_remote_file_name=None, save_interval=save_due
        )
        self.target = open_folder(folder)
        self.keep = keep
        self.overwrite = overwrite
        self.autoresume = autoresume
        self.best = best or Best("MIoU", [])
        self.save_best = save_best
        self.run_name = run_name
        self.own: list[str] = []
        self._is_own = False  # Whether the loaded checkpoint was saved by this run.
        self.last: str | None = None
        self.best_name: str | None = None
        self.ended: str | None = None
        self._save_now = False
        self._is_fitting = self._fit_ended = False
        self.signals = SignalListener()
        self.evaluations = evaluations
        self._loaded = Timestamp().batch

    def check(self) -> None:
        """Lock the folder and test that it is writable; all ranks must call this together.

        Raises:
            ConfigError: Another active run writes to the folder, or the folder is not writable.
        """

        def probe() -> None:
            try:
                self.target.lock(self.run_name)
                self.target.probe()
            except ConfigError:
                raise
            # File systems and object stores raise different exceptions, so catch all.
            except Exception as error:
                problem = f"cannot write to {self.target.path}: {one_line(error)}"
                raise ConfigError(f"save_folder: {problem}") from None

        on_first_process(probe)

    def claim(self, start: str | None, run_name: str | None) -> None:
        """Reject a folder with checkpoints of another run; all ranks must call this together.

        Args:
            start: Path or URI of the checkpoint from which this run resumes, or None.
            run_name: Name of the run that saved this checkpoint.

        Raises:
            ConfigError: The folder contains checkpoints of another run.
        """

        def claimed() -> list[str]:
            names = self.target.names()
            if names and not (self.overwrite or self.autoresume or self._is_own):
                raise self._refusal(names[0])
            self.target.remove_unfinished()
            return names if self.overwrite else []

        if start and is_in_folder(start, self.target.path):
            self._is_own = self.run_name in (run_name, None)
            self.last = start
        self.own = on_first_process(claimed)

    def _refusal(self, name: str) -> ConfigError:
        return ConfigError(
            f"save_folder: {self.target.path} contains {name} from a different run; use a "
            "different save_folder, resume that run with autoresume=true and its run_name, or "
            "replace its checkpoints with save_overwrite=true"
        )

    def init(self, state: State, logger: Logger) -> None:
        pass  # Nothing to do: check() has already created the folder.

    def after_load(self, state: State, logger: Logger) -> None:
        self._loaded = state.timestamp.batch
        if self._is_own and not self.evaluations.due:
            # The loaded checkpoint is complete, so do not save it again when the epoch ends.
            self.last_checkpoint_batch = self._loaded
        if state.dataloader_len is not None:
            self.best.batches_per_epoch = int(state.dataloader_len)

        def tidy() -> str | None:
            """Point to the resumed run's best checkpoint, and finish removing old checkpoints."""
            names = self.target.names()
            later = [name for name in names if batch_of(name) > self._loaded.value]
            if later and not (self.overwrite or self.autoresume):
                raise self._refusal(later[0])
            best = self.best_name if self.best_name in names else None
            self.target.point_best(best)
            if self._is_own and self.last:
                newest = os.path.basename(self.last)
                self.target.remove(outdated(names, newest, self.keep, best, self.own))
            return best

        self.best_name = on_first_process(tidy)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._is_fitting = True
        self._stop_if_signalled(state, logger)

    def batch_end(self, state: State, logger: Logger) -> None:
        self.evaluations.postponed = self.signals.any_process_signalled(state)

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)
        if self.evaluations.postponed:
            self._stop(state)

    def eval_batch_end(self, state: State, logger: Logger) -> None:
        self._stop_if_signalled(state, logger)

    def _stop_if_signalled(self, state: State, logger: Logger) -> None:
        """If a signal has arrived, stop the run, after saving a checkpoint of anything new."""
        if self.signals.any_process_signalled(state):
            if state.timestamp.batch != self._loaded:
                self._save_checkpoint(state, logger)
            self._stop(state)

    def eval_end(self, state: State, logger: Logger) -> None:
        self.evaluations.due = False
        if state.timestamp.batch == 0:  # There is nothing to save before the first batch.
            return
        if self.best.improved(state) and self.save_best:
            self.best_name = _name(state)
            self._save_now = True
        if self.best.is_long_ago(state):
            self.ended = self.best.patience
            self._save_now = True
            state.stop_training()
        if self._save_now:
            # If this batch already has a checkpoint, save it again, because it lacks the new score.
            self.last_checkpoint_batch = None
            if not self._is_fitting:
                # The run has just resumed from this batch's checkpoint, so do not save it again.
                self._save_now = False
                on_first_process(lambda: self.target.point_best(self.best_name))
            elif self._fit_ended:
                self._save_checkpoint(state, logger)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._fit_ended = True

    def _stop(self, state: State) -> None:
        batch, name = state.timestamp.batch.value, state.run_name
        command = "the same command"
        if not self.autoresume:
            command += f" with autoresume=true run_name={name}"
        raise Stopped(
            f"stopped after batch {batch} as requested; checkpoint: "
            f"{self.last or 'no checkpoint yet'}; to resume, run {command}"
        )

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self.last_checkpoint_batch = state.timestamp.batch
        self._save_now = False
        name = _name(state)
        # Keep checkpoints that were saved with keep=-1, even if the run resumes with a different
        # `keep`.
        others = [other for other in self.own if other != name]
        self.own = [*others, name] if self.keep > 0 else []
        content = {"state": state.state_dict(), "rng": reproducibility.get_rng_state()}
        on_first_process(lambda: self._write(content, name))
        self.last = f"{self.target.path}/{name}"
        before = [path for path in self.saved_checkpoints if path != self.last]
        self.saved_checkpoints = [*before, self.last]
        if self.keep > 0:
            self.saved_checkpoints = self.saved_checkpoints[-self.keep :]

    def _write(self, content: dict[str, Any], name: str) -> None:
        """Write a checkpoint to a temporary file, and publish the file once it is on the disk."""
        last = self.last or "none"
        if not _is_finite(content["state"]):
            raise RunError(
                f"{name} was not saved, because its weights are not finite; the last good "
                f"checkpoint is {last}; try a lower optimizer.lr"
            )
        unfinished = os.path.join(self.target.scratch, f"{name}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())
            own = tuple(self.own)
            self.target.publish(NewCheckpoint(unfinished, name, self.keep, self.best_name, own))
        except (OSError, RuntimeError, UserError) as error:
            with suppress(OSError):
                os.remove(unfinished)
            if isinstance(error, RunError):
                raise
            # If a write fails, torch raises a second error while closing the archive. Report the
            # first error, which says what is wrong with the disk.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise RunError(
                f"cannot save {self.target.path}/{name}: {one_line(cause)}; the last good "
                f"checkpoint is {last}"
            ) from None

    def best_path(self) -> str | None:
        """Return the path of the best checkpoint, or None if it does not exist."""
        if self.best_name and batch_of(self.best_name) == self.best.batch:
            return f"{self.target.path}/{self.best_name}"
        return None

    def finish(self) -> None:
        """Wait until all checkpoints are uploaded; all ranks must call this together."""
        # Wait in short steps, because the other ranks would time out during a single long wait.
        while not on_first_process(lambda: self.target.wait(30)):
            log.warning("waiting for the upload of %s", self.last)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Stop after the current batch if a signal arrives, or at once if it arrives again."""
        with self.signals.listening():
            try:
                yield
            except RunError:  # All ranks raise a RunError together, so they all call finish().
                self.finish()
                raise
            finally:
                if dist.get_global_rank() == 0:
                    with suppress(RunError):
                        # Wait less than 30 s, because the launcher kills the remaining processes
                        # after that time.
                        self.target.wait(20)

    def state_dict(self) -> dict[str, Any]:
        return {
            "evaluation_due": self.evaluations.due,
            "best": self.best.state_dict(),
            "best_name": self.best_name,
            "ended": self.ended,
            "own": self.own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.evaluations.due = state.get("evaluation_due", False)
        self.best.load_state_dict(state.get("best", {}))
        self.best_name = state.get("best_name")
        if self._is_own:
            self.own = [*self.own, *state.get("own", [])]
        if self.best.patience is not None and state.get("ended") == self.best.patience:
            self.ended = self.best.patience


def _name(state: State) -> str:
    return f"ep{state.timestamp.epoch.value}-ba{state.timestamp.batch.value}-rank0.pt"


def _is_finite(state: dict[str, Any]) -> bool:
    """Return whether the weights, the averaged weights and the optimizer state are all finite."""
    parts = tree_iter([state["model"], state["optimizers"], state["algorithms"]])
    tensors = [part for part in parts if isinstance(part, torch.Tensor) and part.numel()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    return all(math.isfinite(largest) for largest in torch._foreach_norm(floats, math.inf))
