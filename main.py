"""Train or evaluate the segmentation network that a YAML file describes.

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
    # Answer --help and report a bad config here, before the slow import of torch.
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

from composer import Trainer
from composer.core import Callback, DataSpec
from composer.loggers import LoggerDestination
from composer.utils import dist

from data import build_run_data
from errors import Lost, RunError, Stopped, UserError
from model import ComposerDeepLabV3, build_composer_model, weight_init
from networks.base import Network
from training.build_recipe import (
    build_algorithms,
    build_schedule,
    check_lengths,
    loss_weights,
    resumed_factor,
)
from training.callbacks import EvaluationSchedule, build_callbacks, saver_of, start_lines, summary
from training.config import resolve
from training.config_checks import check_evaluates, per_process
from training.distributed import explain, join_processes, set_up_process
from training.launcher import is_first_to_refuse
from training.loggers import build_loggers, log_config, trainer_options
from training.microbatch import check_single_images, choose_microbatch
from training.optimizer import apply_settings, build_optimizer, settings_of
from training.precision import Precision, compile_if_wanted, compiles, stop_broadcasts
from training.schema import Config
from training.start import build_saver, find_run_start, guarded_loading, release_save_folder
from transforms import device_transforms

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from checkpointing.resume import Start
    from training.watch import Watch

log = logging.getLogger(__name__)

Data = tuple[DataSpec | None, DataSpec]  # Training data (or None) and evaluation data.


def main(
    config: DictConfig | dict[str, Any] | Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: Data | None = None,
) -> Trainer:
    """Train, or only evaluate if the config sets `is_train: false`.

    Args:
        config: Content of the YAML, as loaded by OmegaConf; training/schema.py lists its keys.
        callbacks: Additional callbacks, called before the callbacks that the config requests.
        loggers: Loggers to use in addition to those in the config.
        data: Training data and evaluation data to use instead of the config's data sets.

    Returns:
        The trainer after the run; the network is `trainer.state.model.module`.

    Raises:
        UserError: The config, the data set, the model or a checkpoint is unusable. Subclasses of
            UserError in errors.py tell these cases apart.
        RunError: Training cannot continue, or the user or the scheduler asked the run to stop
            (`Stopped`).
    """
    # Composer reads NODE_RANK, which torchrun does not set. Our command line sets it, but a program
    # that calls main() directly may not.
    name_node(os.environ)
    # Copy the config, so that the caller can change it later without affecting the run.
    if isinstance(config, Config):
        config = copy.deepcopy(config)
    else:
        config = resolve(config, with_data=data is None)
    # An evaluation needs a checkpoint, but `--plan` does not, so check this here rather than in
    # resolve().
    check_evaluates(config)
    try:
        trainer = build_trainer(config, callbacks=callbacks, loggers=loggers, data=data)
        # Print on one rank only, because every rank would print the same lines.
        if dist.get_global_rank() == 0:
            # The progress bar leaves the cursor in the middle of a line, so start a new line.
            print("", *start_lines(trainer, config), sep="\n", flush=True)
        train_or_evaluate(trainer, config)
    finally:
        # Release the lock, so that other runs can use the save folder.
        release_save_folder(config)
    return trainer


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: Data | None = None,
) -> Trainer:
    """Build everything that a run needs before its first step.

    See `main` for the arguments.

    Raises:
        UserError: See `main`.
    """
    # Set up this process: check the GPU, join the other ranks and set the random seeds.
    device, precision = set_up_process(config)

    # Find the checkpoint to start from, lock the save folder, and start the loggers.
    scratch = tempfile.TemporaryDirectory(prefix="checkpoint-")
    evaluations = EvaluationSchedule(config.eval_interval)
    saver = build_saver(config, evaluations)
    start = find_run_start(config, saver, scratch.name)
    loggers = [*build_loggers(config, start), *loggers]

    # Open the data before building the network, so that a missing file is reported within seconds.
    train_data, eval_data, counts = (*data, None) if data else build_run_data(config)
    check_lengths(config, train_data)

    # Build the network. Record its full config, so that it can be rebuilt from a checkpoint alone.
    weights = loss_weights(config, counts)
    config, model = build_model(config, start, precision, weights, (train_data, eval_data))
    check_single_images(config, model.module, train_data)

    # Build the optimizer, algorithms and schedule. Copy the settings: a checkpoint replaces them.
    optimizer = build_optimizer(config.optimizer, model.module)
    settings = settings_of(optimizer)
    algorithms, schedule = build_algorithms(config), build_schedule(config)

    # Choose the micro-batch size before compiling: its estimate needs the uncompiled network.
    microbatch, first_microbatch = choose_microbatch(config, model.module, precision, device)
    compile_if_wanted(config, model.module, device_transforms((train_data, eval_data)))

    # Build Composer's Trainer, which loads the checkpoint without running any code in the file.
    with guarded_loading():
        trainer = Trainer(
            run_name=config.run_name,
            model=model,
            train_dataloader=train_data,
            eval_dataloader=eval_data,
            eval_interval=evaluations,
            max_duration=config.max_duration,
            optimizers=optimizer,
            schedulers=schedule if config.is_train else None,  # An evaluation has no schedule.
            algorithms=algorithms,
            callbacks=[*callbacks, *build_callbacks(config, saver, loggers, start)],
            loggers=loggers,
            load_path=start.state_path if start else None,
            spin_dataloaders=False,  # Our sampler resumes without replaying earlier batches.
            device=device,
            precision=precision.composer,
            device_train_microbatch_size=microbatch,
            **trainer_options(config),
        )
    scratch.cleanup()

    # Reapply settings that the user changed since the checkpoint, such as the learning rate.
    if start and start.state_path:
        factor = resumed_factor(schedule, trainer.state, config, start.weights.config)
        apply_settings(trainer.state, settings, factor)
    # With "auto", start at the estimated size: each size that is too large costs a compilation.
    if first_microbatch is not None:
        trainer.state.device_train_microbatch_size = first_microbatch
    stop_broadcasts(config, trainer.state)
    log_config(trainer, config, weights)
    return trainer


def build_model(
    config: Config,
    start: Start | None,
    precision: Precision,
    class_weights: list[float] | None,
    data: Data,
) -> tuple[Config, ComposerDeepLabV3]:
    """Build the model, load its initial weights, and normalise the data as the network expects.

    Returns:
        The config with all arguments needed to rebuild the network, and the model.
    """
    keys: dict[str, Any] = {**asdict(config.model), "class_weights": class_weights}
    del keys["freeze_backbone"]  # FreezeBackbone handles this key.
    if start:
        # Do not download pretrained weights that the checkpoint replaces anyway.
        keys["backbone_weights"] = None
    model = build_composer_model(
        **keys,
        init_fn=weight_init,
        cpu_autocast=precision.cpu_autocast,
        # Pad the last evaluation batch, so that a compiled network sees only one batch size.
        eval_batch_size=per_process(config.eval_dataset) if compiles(config) else None,
    )
    network = model.module
    # A network from another library may have its own normalisation and limits on the image size.
    # DeepLabV3 is not a `Network` and uses the default normalisation.
    if isinstance(network, Network):
        sizes = {config.train_dataset.final_size} if config.is_train else set()
        # Try a forward pass at each image size now, so that an incompatible network fails within
        # seconds.
        network.check(config.model.num_classes, sorted(sizes | {config.eval_dataset.final_size}))
        config = replace(config, model=replace(config.model, arguments=network.arguments))
        for transform in device_transforms(data):
            transform.normalise_by(network.mean, network.std)
    if start and start.state_path:
        # Only check the weights here. Composer loads them later, together with the optimizer state.
        start.check_network(network)
    elif start:
        from training.initial_weights import load_initial_weights

        load_initial_weights(config, start, network)
    # Convert the weights to channels-last, because the loader's batches have this layout.
    model.to(memory_format=network.memory_format)  # pyrefly: ignore[no-matching-overload]
    return config, model


def train_or_evaluate(trainer: Trainer, config: Config) -> None:
    """Train to the end of the run, or evaluate once if the config sets `is_train: false`."""
    if not config.is_train:
        trainer.eval()
        return

    saver = saver_of(trainer.state)
    # On a signal such as SIGTERM, save a checkpoint after the current batch.
    with saver.listening() if saver else nullcontext():
        time, end = trainer.state.timestamp, trainer.state.max_duration
        is_complete = end is not None and time >= end
        is_stopped = saver is not None and saver.ended is not None
        is_due = saver is not None and saver.evaluations.due
        # If an interrupted run did not finish its evaluation, evaluate before training. Also
        # evaluate a finished run, so that repeating the command prints its score again.
        if is_due or is_complete or is_stopped or (config.eval_first and time.batch == 0):
            trainer.eval()
        if is_complete:
            log.warning(
                "nothing is left to train: the run has reached max_duration=%s; raise it to "
                "continue",
                config.max_duration,
            )
        # Do not use is_stopped here, because the evaluation above may have triggered early
        # stopping.
        elif saver and saver.ended:
            log.warning(
                "nothing is left to train: the run did not improve for stop_after=%s; raise it "
                "to continue",
                saver.ended,
            )
        else:
            trainer.fit()
        # Wait until all background uploads to the object store are complete.
        if saver:
            saver.finish()


def run(arguments: list[str], **options: Any) -> int:
    """Run a command line and return the exit status.

    Args:
        arguments: A YAML file and any overrides, such as `seed=1`; or `--help`; or `--plan` and its
            options.
        **options: Arguments of `main`, such as additional callbacks and loggers.
    """
    try:
        config = read_command_line(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    # For --plan, read_command_line returns None, because the planner parses its own options.
    return run_config(config, **options) if config else run_plan(arguments)


def run_plan(arguments: list[str]) -> int:
    """Predict a run's time, memory and disk space without running it; return the exit status."""
    # Import the planner only on demand, so that a training run does not load extras/.
    from extras.planning.plan import main as plan

    return plan(arguments, build_trainer)


def run_config(config: Config, **options: Any) -> int:
    """Train or evaluate together with the run's other ranks; return the exit status."""
    logging.basicConfig(
        level=(config.python_log_level or "warning").upper(),
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        watch = join_processes()
    except Lost as lost:
        return _refuse(lost)
    # If an unexpected error occurs, report status 1 to the other ranks.
    status = 1
    try:
        status = _run_to_end(config, watch, **options)
    finally:
        if watch:
            watch.close(status)
    return status


def _run_to_end(config: Config, watch: Watch | None, **options: Any) -> int:
    """Train or evaluate; report known errors in one line and return an exit status.

    The status is 0 for success, 1 if the run cannot continue, 2 for bad input, and 75 if the run
    can be resumed.
    """
    try:
        trainer = main(config, **options)
    except Stopped as stop:
        if dist.get_global_rank() == 0:
            print(stop)
        return stop.status
    except UserError as error:
        return _refuse(error, watch)
    # NCCL, gloo, the data loader and the file system all raise these types. `explain` tells their
    # errors apart.
    except (RuntimeError, OSError) as error:
        known = explain(error, watch)
        if known is None:
            # An unknown error is probably a bug, so show its traceback.
            raise
        return _refuse(known, watch)
    text = summary(trainer)
    trainer.close()  # Close the progress bar before printing the summary.
    if dist.get_global_rank() == 0:
        print(text)
    return 0


def _refuse(error: UserError | RunError, watch: Watch | None = None) -> int:
    """Print an error once, even if every rank raises it, and return its exit status."""
    # torchrun restarts a run even if its config is bad. A marker file in torchrun's folder keeps
    # later attempts from printing the same error again.
    is_first = is_first_to_refuse(str(error)) if error.status == 2 else None
    if is_first is None:
        is_first = watch is None or watch.is_first_to_say(str(error))
    if is_first:
        print(f"error: {error}", file=sys.stderr)
    return error.status


if __name__ == "__main__":
    sys.exit(run_config(CONFIG) if CONFIG else run_plan(sys.argv[1:]))
