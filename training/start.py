"""Functions that find the checkpoint from which a run starts, and that lock its save folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from composer.utils import dist

from errors import ConfigError
from files import is_remote
from training.config import class_infos
from training.keys import flatten
from training.schema import Config, compared_values

if TYPE_CHECKING:
    from checkpointing.resume import Start
    from checkpointing.saver import Checkpoints
    from training.callbacks import EvaluationSchedule

log = logging.getLogger(__name__)


def build_saver(config: Config, evaluations: EvaluationSchedule) -> Checkpoints | None:
    """Build the callback that saves checkpoints, and lock the save folder.

    Returns:
        The callback, or None if the run saves nothing.

    Raises:
        ConfigError: Another active run writes to the folder, or the folder is not writable.
    """
    if not config.is_train:
        return None
    if not config.save_folder:
        if dist.get_global_rank() == 0:
            log.warning(
                "save_folder is empty: this run saves no checkpoint, so it cannot be resumed"
            )
        return None
    from checkpointing.best import Best
    from checkpointing.saver import Checkpoints

    saver = Checkpoints(
        config.save_folder,
        config.save_interval,
        evaluations,
        config.save_num_checkpoints_to_keep,
        config.save_overwrite,
        config.autoresume,
        Best(config.best_metric, class_infos(config), config.stop_after),
        config.save_best,
        config.run_name,
    )
    saver.check()
    return saver


def find_run_start(config: Config, saver: Checkpoints | None, scratch: str) -> Start | None:
    """Find the checkpoint from which a run starts and check that the config matches it.

    With `autoresume`, the run starts from the newest checkpoint in `save_folder` if there is one.
    Otherwise, it starts from `load_path` or, if this is empty, from `model.backbone_weights`.

    Args:
        config: Config of the run.
        saver: Callback that saves the run's checkpoints, or None.
        scratch: Local folder for downloads.

    Returns:
        The checkpoint, or None to start from the weights named in the config.

    Raises:
        ConfigError: A checkpoint cannot be read, or the config does not match it.
        WeightsError: The file named by `load_path` is damaged.
    """
    start = _find_start(config, scratch) if config.autoresume or config.load_path else None
    if start is None and not config.is_train and config.autoresume:
        raise ConfigError(
            f"save_folder: {config.save_folder} contains no checkpoint to evaluate; set load_path"
        )
    if start and (start.state_path or not config.is_train):
        compared = compared_values(config)
        if not config.is_train:
            compared = {k: v for k, v in compared.items() if k.startswith("model.")}
        start.check_config(compared, flatten(Config()), class_infos(config))
    if saver and start and start.state_path:
        saver.claim(start.where, start.weights.run_name)
    elif saver:
        saver.claim(None, None)
    return start


def _find_start(config: Config, scratch: str) -> Start | None:
    """Find the checkpoint to start from: the newest in the save folder, or else `load_path`."""
    from checkpointing.resume import Start, local_copy, newest_checkpoint, plainly_named
    from checkpointing.weights import check_checkpoint, load_weights

    folder = config.save_folder if config.autoresume else None
    if folder and (found := newest_checkpoint(folder, scratch)):
        where, path = found
        weights = load_weights(path)
        owner = weights.run_name
        if owner in (None, config.run_name):
            # Evaluation needs only the weights, not the training state.
            state_path = plainly_named(path, scratch) if config.is_train else None
            return Start(where, weights, state_path, is_resume=True)
        if not config.save_overwrite:
            raise ConfigError(
                f"save_folder: {where} belongs to run {owner}, not to {config.run_name}; use a "
                f"different save_folder, or set run_name={owner}"
            )
        log.warning("save_overwrite=true replaces %s, which belongs to run %s", where, owner)
    if not config.load_path:
        return None
    path = local_copy(config.load_path, scratch)
    where = config.load_path if is_remote(config.load_path) else path
    weights = load_weights(path)
    if config.load_weights_only or not config.is_train:
        return Start(where, weights, None, is_resume=False)
    check_checkpoint(path)
    return Start(where, weights, plainly_named(path, scratch), is_resume=False)


@contextmanager
def guarded_loading() -> Iterator[None]:
    """Make Composer call `check_checkpoint` on every file before unpickling it.

    The check prevents a checkpoint from executing code. It also applies to files that Composer
    downloads from an object store.
    """
    variable = "CHECKPOINT_VALIDATION_FUNCTION"
    before = os.environ.get(variable)
    os.environ[variable] = "checkpointing.weights.check_checkpoint"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def release_save_folder(config: Config) -> None:
    """Release the lock on a run's save folder, if it has one."""
    if config.save_folder:
        from checkpointing.lock import release_locks

        release_locks()
