"""Train or evaluate DeepLabV3+ as a YAML says.

composer main.py yamls/deeplabv3.yaml                             # every GPU of this machine
composer main.py yamls/deeplabv3.yaml recipe_name=mild seed=1     # override keys of the YAML
python main.py --help                                             # list the keys
python main.py yamls/deeplabv3.yaml --plan                        # predict time, memory and disk
"""

from __future__ import annotations

import sys

from command_lines import name_node
from command_lines import start as prepare_process
from training.config import read_command_line

if __name__ == "__main__":
    # Answer --help and report a bad config here, in half a second, before torch is imported.
    prepare_process()
    CONFIG = read_command_line(sys.argv[1:])

import copy
import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from composer import Trainer
from composer.core import Callback, DataSpec
from composer.devices import Device
from composer.loggers import LoggerDestination
from composer.utils import dist, get_device, reproducibility

from checkpointing.evaluations import EvaluationSchedule
from data import build_run_data
from errors import TRY_AGAIN, Lost, Stopped, StoreError, UserError, one_line
from model import ComposerDeepLabV3, build_composer_model, weight_init
from networks.base import Network
from training.build_recipe import (
    build_algorithms,
    build_schedule,
    check_lengths,
    loss_weights,
    resumed_factor,
)
from training.callbacks import build_callbacks, saver_of, start_lines, summary
from training.config import resolve
from training.config_checks import check_evaluates, per_process
from training.distributed import explain, join_processes
from training.launcher import COLLECTIVE_TIMEOUT, is_first_to_refuse
from training.loggers import build_loggers, log_config, trainer_options
from training.microbatch import check_single_images, choose_microbatch
from training.optimizer import apply_settings, build_optimizer, settings_of
from training.precision import (
    Precision,
    check_build_tools,
    check_kernels,
    choose_precision,
    compile_if_wanted,
    compiles,
    stop_broadcasts,
)
from training.schema import Config
from training.start import (
    RunStart,
    build_saver,
    find_run_start,
    guarded_loading,
    release_save_folder,
)
from transforms import device_transforms

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from training.watch import Watch

log = logging.getLogger(__name__)

Data = tuple[DataSpec | None, DataSpec]  # of training and of evaluation


def main(
    config: DictConfig | dict[str, Any] | Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: Data | None = None,
) -> Trainer:
    """Train (or, with `is_train: false`, evaluate) as the config says.

    Args:
        config: The YAML as OmegaConf loads it; see training/schema.py for the keys.
        callbacks: More callbacks, which run before the run's own.
        loggers: More loggers.
        data: Training and evaluation data, in place of the config's.

    Returns:
        The trainer after the run; the network is `trainer.state.model.module`.

    Raises:
        UserError: The config, the data set, the model or a checkpoint cannot be used; errors.py
            has a class for each.
        RunError: Training cannot go on, or was told to stop (`Stopped`).
    """
    name_node(os.environ)
    # Copy the caller's config, so that later changes to it do not change the run.
    if isinstance(config, Config):
        config = copy.deepcopy(config)
    else:
        config = resolve(config, with_data=data is None)
    check_evaluates(config)
    try:
        trainer = build_trainer(config, callbacks=callbacks, loggers=loggers, data=data)
        if dist.get_global_rank() == 0:
            # The progress bar leaves the cursor within a line, so begin a new one.
            print("", *start_lines(trainer, config), sep="\n", flush=True)
        train_or_evaluate(trainer, config)
    finally:
        release_save_folder(config)  # another process may use it from here on
    return trainer


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: Data | None = None,
) -> Trainer:
    """Build everything that a run needs before its first step; arguments as of `main`.

    Raises:
        UserError: As of `main`.
    """
    # Set up this process: check the GPU, join the other processes, seed.
    device, precision = set_up_process(config)

    # Find where the run begins, and lock the folder that it saves to.
    scratch = tempfile.TemporaryDirectory(prefix="checkpoint-")
    evaluations = EvaluationSchedule(config.eval_interval)
    saver = build_saver(config, evaluations)
    start = find_run_start(config, saver, scratch.name)
    destinations = build_loggers(config, start.server_runs)

    # Open the data before the network: a missing file is found within seconds.
    train_data, eval_data, counts = (*data, None) if data else build_run_data(config)
    check_lengths(config, train_data)

    # Build the network, with the weights that the run begins from.
    weights = loss_weights(config, counts)
    config, model = build_model(config, start, precision, weights, (train_data, eval_data))
    check_single_images(config, model.module, train_data)

    # Build the optimizer and the recipe. Choose the micro-batch before the network is compiled.
    optimizer = build_optimizer(config.optimizer, model.module)
    settings = settings_of(optimizer)
    algorithms, schedule = build_algorithms(config), build_schedule(config)
    microbatch, first_microbatch = choose_microbatch(config, model.module, precision, device)
    compile_if_wanted(config, model.module, device_transforms((train_data, eval_data)))

    # Composer brings the parts together, and loads the state of a run that resumes.
    with guarded_loading(start):
        trainer = Trainer(
            run_name=config.run_name,
            model=model,
            train_dataloader=train_data,
            eval_dataloader=eval_data,
            eval_interval=evaluations,
            max_duration=config.max_duration,
            optimizers=optimizer,
            # A schedule needs the length of an epoch, which an evaluation alone does not have.
            schedulers=schedule if config.is_train else None,
            algorithms=algorithms,
            # The saver comes last, so that a checkpoint holds what the others did after its step.
            callbacks=[*callbacks, *build_callbacks(config, saver, [*destinations, *loggers])],
            loggers=[*destinations, *loggers],
            load_path=start.state_path,
            spin_dataloaders=False,  # our sampler computes the order of samples from the epoch
            device=device,
            precision=precision.composer,
            device_train_microbatch_size=microbatch,
            **trainer_options(config),
        )
    scratch.cleanup()

    # Apply what Composer does not: changed keys of a resumed run, the first micro-batch to try.
    if start.state_path:
        factor = resumed_factor(schedule, trainer.state, config, start.record)
        apply_settings(trainer.state, settings, factor)
    if first_microbatch is not None:
        trainer.state.device_train_microbatch_size = first_microbatch
    stop_broadcasts(config, trainer.state)
    log_config(trainer, config, weights)
    return trainer


def set_up_process(config: Config) -> tuple[Device, Precision]:
    """Check what this machine can compute, join the run's processes, and seed this one.

    Raises:
        ConfigError: The GPU, the precision or the compiler cannot be used.
    """
    check_kernels()
    missing = check_build_tools(config)
    if missing and dist.get_local_rank() == 0:
        log.warning("%s", missing)
    precision = choose_precision(config.precision)
    device = get_device(None)
    if dist.get_world_size() > 1:
        dist.initialize_dist(device, timeout=COLLECTIVE_TIMEOUT)
    reproducibility.seed_all(config.seed)
    # Images have one size, so cuDNN's search for the fastest kernels pays off.
    torch.backends.cudnn.benchmark = not config.deterministic
    return device, precision


def build_model(
    config: Config,
    start: RunStart,
    precision: Precision,
    class_weights: list[float] | None,
    data: Data,
) -> tuple[Config, ComposerDeepLabV3]:
    """Build the model, with the weights to begin from; the data is normalised for its network.

    Returns:
        The config, with all arguments that rebuild the network, and the model.
    """
    keys: dict[str, Any] = {**asdict(config.model), "class_weights": class_weights}
    del keys["freeze_backbone"]  # an algorithm of the recipe
    if start.checkpoint:
        keys["backbone_weights"] = None  # the checkpoint's weights replace them
    model = build_composer_model(
        **keys,
        init_fn=weight_init,
        cpu_autocast=precision.cpu_autocast,
        # A compiled network sees one batch size, so the last batch of an evaluation is padded.
        eval_batch_size=per_process(config.eval_dataset) if compiles(config) else None,
    )
    network = model.module
    if isinstance(network, Network):
        sizes = {config.train_dataset.final_size} if config.is_train else set()
        network.check(config.model.num_classes, sorted(sizes | {config.eval_dataset.final_size}))
        config = replace(config, model=replace(config.model, arguments=network.arguments))
        for transform in device_transforms(data):
            transform.normalise_by(network.mean, network.std)
    if start.checkpoint and start.state_path:
        start.checkpoint.check_network(network)  # Composer loads it with the state of training
    elif start.checkpoint:
        from training.initial_weights import load_initial_weights

        load_initial_weights(config, start.checkpoint, network)
    model.to(memory_format=network.memory_format)  # pyright: ignore (torch's overloads lack it)
    return config, model


def train_or_evaluate(trainer: Trainer, config: Config) -> None:
    """Train to the end of the run, or evaluate once if the config says `is_train: false`."""
    if not config.is_train:
        trainer.eval()
        return

    saver = saver_of(trainer.state)
    with saver.listening() if saver else nullcontext():
        time, end = trainer.state.timestamp, trainer.state.max_duration
        is_complete = end is not None and time >= end
        is_stopped = saver is not None and saver.ended is not None
        is_due = saver is not None and saver.evaluations.due
        if is_due or is_complete or is_stopped or (config.eval_first and time.batch == 0):
            trainer.eval()
        if is_complete:
            log.warning("nothing is left to train: max_duration=%s is reached", config.max_duration)
        elif saver and saver.ended:
            log.warning("nothing is left to train: stop_after=%s is reached", saver.ended)
        else:
            trainer.fit()
        if saver:
            saver.finish()


def run(
    arguments: list[str],
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
) -> int:
    """Run a command line; return the exit status.

    Args:
        arguments: The YAML and overrides such as `seed=1`, `--help`, or `--plan` and its options.
        callbacks: As of `main`.
        loggers: As of `main`.
    """
    try:
        config = read_command_line(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    return run_config(config, callbacks, loggers) if config else run_plan(arguments)


def run_plan(arguments: list[str]) -> int:
    """Print what a run would take, without running it; return the exit status."""
    from extras.planning.plan import main as plan

    return plan(arguments, build_trainer)


def run_config(
    config: Config, callbacks: Sequence[Callback] = (), loggers: Sequence[LoggerDestination] = ()
) -> int:
    """Run a config together with the other processes of its launcher; return the exit status."""
    logging.basicConfig(
        level=(config.python_log_level or "warning").upper(),
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        watch = join_processes()
    except Lost as lost:
        return _refuse(lost, lost.status)
    status = 1
    try:
        status = _run_to_end(config, callbacks, loggers, watch)
    finally:
        if watch:
            watch.close(status)
    return status


def _run_to_end(
    config: Config,
    callbacks: Sequence[Callback],
    loggers: Sequence[LoggerDestination],
    watch: Watch | None,
) -> int:
    """Train or evaluate, and turn what can go wrong into a line and an exit status."""
    try:
        trainer = main(config, callbacks=callbacks, loggers=loggers)
    except Stopped as stop:
        if dist.get_global_rank() == 0:
            print(stop)
        return TRY_AGAIN
    except StoreError as error:
        return _refuse(error, TRY_AGAIN, watch)
    except UserError as error:
        return _refuse(error, 2, watch)
    except (RuntimeError, OSError) as error:
        known = explain(error, watch)
        if known is None and isinstance(error, OSError):  # a full disk, for example
            return _refuse(one_line(error), 1, watch)
        if known is None:
            raise
        return _refuse(known, known.status if isinstance(known, Lost) else 1, watch)
    text = summary(trainer)
    trainer.close()  # and with it the progress bar
    if dist.get_global_rank() == 0:
        print(text)
    return 0


def _refuse(error: Exception | str, status: int = 2, watch: Watch | None = None) -> int:
    """Print an error, and return the status. An error that all processes find is printed once."""
    is_first = is_first_to_refuse(str(error)) if status == 2 else None
    if is_first is None:
        is_first = watch is None or watch.is_first_to_say(str(error))
    if is_first:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run_config(CONFIG) if CONFIG else run_plan(sys.argv[1:]))
