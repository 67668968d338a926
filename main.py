"""Train or evaluate DeepLabV3+ as a YAML says.

composer main.py yamls/deeplabv3.yaml                             # every GPU of this machine
composer main.py yamls/deeplabv3.yaml recipe_name=mild seed=1     # keys of the YAML, overridden
python main.py --help                                             # the keys
python main.py yamls/deeplabv3.yaml --plan                        # what the run would take
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence, Sized
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, cast

from command_lines import start
from errors import (
    TRY_AGAIN,
    ClassError,
    ConfigError,
    Lost,
    Stopped,
    StoreError,
    UserError,
    one_line,
)
from training.config import class_infos, data_sources, help_text, load, resolve
from training.config_checks import check_evaluates, world_size
from training.schema import Config, compared_values, flatten

if TYPE_CHECKING:
    import torch
    from composer import Trainer
    from composer.core import Callback, DataSpec
    from composer.loggers import LoggerDestination
    from omegaconf import DictConfig

    from checkpointing.resume import Start
    from model import ComposerDeepLabV3
    from training.watch import Watch

log = logging.getLogger(__name__)


def main(
    config: DictConfig | dict[str, Any] | Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: tuple[DataSpec | None, DataSpec] | None = None,
) -> Trainer:
    """Train (or, with `is_train: false`, evaluate) as the config says.

    Args:
        config: The YAML as OmegaConf loads it; see training/schema.py for the keys.
        callbacks: Besides the run's own, and before them.
        loggers: Besides those of the config.
        data: For training and evaluation, in place of the config's.

    Returns:
        The trainer after the run; the network is `trainer.state.model.module`.

    Raises:
        UserError: The config, the data set, the model or a checkpoint cannot be used; each has a
            class of its own in errors.py.
        RunError: Training cannot go on, or was told to stop (`Stopped`).
    """
    # The caller's config stays as it is, and later changes to it do not change the run.
    if isinstance(config, Config):
        config = copy.deepcopy(config)
    else:
        config = resolve(config, with_data=data is None)
    check_evaluates(config)
    try:
        trainer = build_trainer(config, callbacks=callbacks, loggers=loggers, data=data)
        _train_or_evaluate(trainer, config)
    finally:
        if config.save_folder:
            from checkpointing.lock import release_locks

            release_locks()  # of save_folder, which another process may use from here on
    return trainer


def _train_or_evaluate(trainer: Trainer, config: Config) -> None:
    from training.callbacks import saver_of
    from training.distributed import report_start

    report_start(trainer.state.timestamp.batch.value)
    if not config.is_train:
        trainer.eval()
        return

    saver = saver_of(trainer.state)
    with saver.listening() if saver else nullcontext():
        first = config.eval_first and trainer.state.timestamp.batch == 0
        end = trainer.state.max_duration
        complete = end is not None and trainer.state.timestamp >= end
        ended = saver is not None and saver.ended is not None
        if first or complete or ended or (saver and saver.evaluation_due):
            trainer.eval()
        if complete:
            log.warning("nothing is left to train: max_duration=%s is reached", config.max_duration)
        elif saver and saver.ended:
            log.warning("nothing is left to train: stop_after=%s is reached", saver.ended)
        else:
            trainer.fit()
        if saver:
            saver.finish()


def build_trainer(
    config: Config,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
    data: tuple[DataSpec | None, DataSpec] | None = None,
) -> Trainer:
    """Do what `main` does before the first step; arguments and errors are those of `main`."""
    level = (config.python_log_level or "warning").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")

    # Only now what takes seconds to import: a wrong config has been answered by here.
    import torch
    from composer import Trainer
    from composer.loggers import ProgressBarLogger
    from composer.utils import dist, get_device, reproducibility
    from torch._functorch import config as functorch

    from checkpointing.weights import guarded_unpickling
    from data import build_data
    from training.callbacks import build_callbacks
    from training.loggers import build_loggers
    from training.microbatch import check_single_images, first_microbatch, last_batch_of
    from training.optimizer import apply_settings, build_optimizer, settings_of
    from training.precision import check_build_tools, check_kernels, choose_precision, compiles
    from training.recipes import build_recipe, check_lengths, resumed_factor
    from transforms import DeviceTransform

    check_kernels()
    slower = check_build_tools(config)
    if slower and dist.get_local_rank() == 0:
        log.warning("%s", slower)
    precision, cpu_autocast = choose_precision(config.precision)
    device = get_device(None)
    if dist.get_world_size() > 1:
        from training.watch import PATIENCE

        dist.initialize_dist(device, timeout=PATIENCE)
    reproducibility.seed_all(config.seed)
    scratch = tempfile.TemporaryDirectory(prefix="checkpoint-")
    saver = None
    if config.save_folder and config.is_train:
        from checkpointing.best import Best
        from checkpointing.saver import Checkpoints

        saver = Checkpoints(
            config.save_folder,
            config.save_interval,
            config.eval_interval,
            config.save_num_checkpoints_to_keep,
            config.save_overwrite,
            config.autoresume,
            Best(config.best_metric, class_infos(config), config.stop_after),
            config.save_best,
            config.run_name,
        )
        saver.check()
    elif config.is_train and dist.get_global_rank() == 0:
        log.warning("save_folder is empty: this run keeps no checkpoint, so nothing can resume it")
    start = None
    if config.autoresume or config.load_path:
        from checkpointing.resume import find_start

        start = find_start(
            config.save_folder if config.autoresume else None,
            config.load_path,
            config.load_weights_only or not config.is_train,
            scratch.name,
            config.run_name,
            config.save_overwrite,
        )
    state_path = start.state_path if start and config.is_train else None
    if start is None and not config.is_train and config.autoresume:
        raise ConfigError(
            f"save_folder: {config.save_folder} holds no checkpoint to evaluate; give load_path"
        )
    if start and (state_path or not config.is_train):
        compared = compared_values(config)
        if not config.is_train:
            compared = {k: v for k, v in compared.items() if k.startswith("model.")}
        start.check_config(compared, flatten(Config()), class_infos(config))
    # A resumed run of the same name continues its W&B and MLflow runs.
    server_runs = {}
    if start and state_path and start.weights.run_name == config.run_name:
        server_runs = start.weights.server_runs
    destinations = build_loggers(config, server_runs)
    if saver:
        resumed = start if state_path else None
        saver.claim(resumed and resumed.where, resumed and resumed.weights.run_name)

    counts = None
    if data is None:
        sources = data_sources(config)
        if config.model.class_weights == "auto" or config.train_dataset.rare_class_sampling:
            from training.class_weights import count_training

            counts = count_training(config, sources["train"])
        train = build_data(config, "train", counts, sources["train"]) if config.is_train else None
        data = train, build_data(config, "val", source=sources["val"])
    train_data, eval_data = data
    if train_data is not None:
        check_lengths(config, len(cast(Sized, train_data.dataloader)))

    weights = None
    if config.model.class_weights is not None and config.is_train:
        from training.class_weights import class_weights

        weights = class_weights(config, counts)
    config, model = _build_model(config, start, data, weights)
    if train_data is not None:
        check_single_images(config, model.module, last_batch_of(train_data, config))
    # torch's overloads of `to` leave out the memory format.
    model.to(memory_format=model.module.memory_format)  # pyright: ignore
    model.cpu_autocast = cpu_autocast
    optimizer = build_optimizer(config.optimizer, model.module)
    settings = settings_of(optimizer)
    algorithms, scheduler = build_recipe(config)

    microbatch = config.device_train_microbatch_size
    if microbatch is None or (microbatch == "auto" and not torch.cuda.is_available()):
        microbatch = config.train_dataset.batch_size // dist.get_world_size()
    begin = None
    if microbatch == "auto" and train_data is not None:
        share = config.train_dataset.batch_size // dist.get_world_size()
        begin = first_microbatch(model.module, config, precision, share, device)
    if compiles(config):
        functorch.activation_memory_budget = config.activation_memory_budget
        # Not Composer's way, which compiles DDP's forward pass and leaves evaluation out.
        model.module.compile(dynamic=False)
        for spec in filter(None, data):
            if isinstance(spec.microbatch_transforms, DeviceTransform):
                spec.microbatch_transforms.compile()
        model.eval_batch_size = config.eval_dataset.batch_size // dist.get_world_size()
    shown = config.loggers.get("progress_bar", {}) | config.loggers.get("console", {})
    torch.backends.cudnn.benchmark = not config.deterministic  # sizes do not change
    with guarded_unpickling():
        trainer = Trainer(
            run_name=config.run_name,
            model=model,
            train_dataloader=train_data,
            eval_dataloader=eval_data,
            eval_interval=saver.eval_interval if saver else config.eval_interval,
            max_duration=config.max_duration,
            optimizers=optimizer,
            schedulers=scheduler if config.is_train else None,  # needs the length of an epoch
            algorithms=algorithms,
            callbacks=[
                *callbacks,
                *build_callbacks(config, saver, destinations),
                *([saver] if saver else []),
            ],
            loggers=[*destinations, *loggers],
            progress_bar="progress_bar" in config.loggers,
            log_to_console="console" in config.loggers,
            console_stream=shown.get("stream", "stderr"),
            console_log_interval=shown.get("log_interval", "1ba"),
            log_traces=shown.get("log_traces", False),
            load_path=state_path,
            spin_dataloaders=False,  # the order of samples does not depend on what was read before
            device=device,
            precision=precision,
            device_train_microbatch_size=microbatch,
            deterministic_mode=config.deterministic,
            seed=config.seed,
            python_log_level=config.python_log_level,
        )
    if start and state_path:
        factor = resumed_factor(scheduler, trainer.state, config, start.weights.config)
        apply_settings(trainer.state, settings, factor)
    ranks = dist.get_world_size()
    in_one_node = ranks == dist.get_local_world_size() > 1
    if config.model.name == "deeplabv3" and config.model.sync_bn and in_one_node:
        # Of one node, all have the same statistics: none need be sent around before each pass.
        cast(Any, trainer.state.model).broadcast_buffers = False
    if begin is not None:
        trainer.state.device_train_microbatch_size = begin
    scratch.cleanup()
    trainer.logger.log_hyperparameters(asdict(config))
    if weights is not None:
        from training.class_weights import named

        line = named(weights, class_infos(config))
        trainer.logger.log_hyperparameters({"class_weights": line})
    for destination in trainer.logger.destinations:
        if isinstance(destination, ProgressBarLogger):
            destination.hparams_already_logged_to_console = True  # a hundred lines before the bar
    return trainer


def _build_model(
    config: Config,
    start: Start | None,
    data: tuple[DataSpec | None, DataSpec],
    weights: list[float] | None,
) -> tuple[Config, ComposerDeepLabV3]:
    """Build the network, with the weights to begin from, and have the data normalised as it wants.

    Returns:
        The config, with all that is needed to build the network again, and the model.
    """
    from model import build_composer_model, weight_init
    from networks.base import Network
    from transforms import DeviceTransform

    keys: dict[str, Any] = {**asdict(config.model), "class_weights": weights}
    del keys["freeze_backbone"]  # which is the recipe's
    if start:
        keys["backbone_weights"] = None  # the checkpoint has better ones
    model = build_composer_model(**keys, init_fn=weight_init)
    network, num_classes = model.module, config.model.num_classes
    if isinstance(network, Network):
        sizes = {config.train_dataset.final_size} if config.is_train else set()
        network.check(num_classes, sorted(sizes | {config.eval_dataset.final_size}))
        config = replace(config, model=replace(config.model, arguments=network.arguments))
        for spec in filter(None, data):
            if isinstance(spec.microbatch_transforms, DeviceTransform):
                spec.microbatch_transforms.normalise_by(network.mean, network.std)
    if start and start.state_path and config.is_train:
        start.check_network(network)
    elif start:
        from checkpointing.partial_load import load_fitting

        by_name, class_tensors = _compare_classes(config, start, network)
        classes = class_infos(config) if by_name else None
        least = config.load_least if config.is_train else 1.0
        left = load_fitting(
            network, start.weights, start.where, least, classes, num_classes, class_tensors
        )
        if left:
            log.warning("load_path: %s", left)
    return config, model


def _compare_classes(
    config: Config, start: Start, network: torch.nn.Module
) -> tuple[bool, list[str]]:
    """Compare the run's classes with those of the weights that it begins from.

    Returns:
        Whether rows of the last layer are taken over by the names of their classes, and the names
        of the tensors with such rows, if the weights have as many classes but not the same.

    Raises:
        ClassError: The weights to evaluate are of other classes.
        ConfigError: The classes are to be matched by name, and the file has no names.
    """
    from segmentation.classes import are_named, match_classes

    ours, theirs = class_infos(config), start.weights.classes
    if config.load_classes_by_name and not are_named(theirs):
        raise ConfigError(
            f"load_classes_by_name: {start.where} does not name its classes; leave the key out"
        )
    if theirs is not None and len(theirs) != len(ours):
        return config.load_classes_by_name, []
    try:
        if match_classes(ours, theirs, "the run", start.where) is None:
            return config.load_classes_by_name, []
        by_name = True
    except ClassError as error:
        # An evaluation needs the right row for each class. Training may learn rows anew, as it does
        # for weights with another number of classes.
        if not config.is_train:
            raise ClassError(f"load_path: {error}") from None
        by_name = config.load_classes_by_name
        hint = "" if by_name else "; load_classes_by_name=true takes over those of the same name"
        log.warning("load_path: %s%s", error, hint)
    return by_name, _class_tensors(config, network)


def _class_tensors(config: Config, network: torch.nn.Module) -> list[str]:
    """Return the names of a network's tensors with a row a class: another class makes them longer.

    Raises:
        ClassError: Another class changes more than a number of rows.
    """
    from networks.base import inner

    model = replace(config.model, num_classes=config.model.num_classes + 1)
    larger = inner(build_network(replace(config, model=model))).state_dict()
    own = inner(network).state_dict()
    names = [name for name in own if own[name].shape != larger[name].shape]
    if any(own[name].shape[1:] != larger[name].shape[1:] for name in names):
        raise ClassError(
            f"load_path: its classes are in another order, and {config.model.name} has no layer "
            "with a row a class; list class_names in the order of the checkpoint"
        )
    return names


def run(
    arguments: list[str],
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[LoggerDestination] = (),
) -> int:
    """Run the command line, with more callbacks and loggers as of `main`; return the status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    if "--plan" in arguments:
        began = time.perf_counter()
        from extras.planning.plan import main as plan

        return plan(arguments, build_trainer, build_network, began)
    try:
        config = resolve(load(arguments[0], arguments[1:]))
        check_evaluates(config)
    except ConfigError as error:
        return _refuse(error)

    from training.distributed import end_with_launcher

    end_with_launcher()
    watch = None
    if world_size() > 1:
        from training.watch import join

        try:
            watch = join()
        except Lost as lost:
            return _refuse(lost, lost.status)
    status = 1
    try:
        status = _run(config, callbacks, loggers, watch)
    finally:
        if watch:
            watch.close(status)
    return status


def _run(
    config: Config,
    callbacks: Sequence[Callback],
    loggers: Sequence[LoggerDestination],
    watch: Watch | None,
) -> int:
    """Do as the config says; return the status."""
    from composer.utils import dist

    from training.callbacks import summary
    from training.distributed import explain

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


def build_network(config: Config) -> torch.nn.Module:
    """Build a run's network for planning: without weights, on "meta"."""
    import torch

    from model import build_composer_model

    keys = asdict(config.model) | {"backbone_weights": None, "sync_bn": False}
    keys["class_weights"] = None
    del keys["freeze_backbone"]
    # Others read numbers off tensors while they are built.
    with torch.device("meta" if config.model.name == "deeplabv3" else "cpu"):
        network = build_composer_model(**keys).module.to("meta")
    # torch's overloads of `to` leave out the memory format.
    return network.to(memory_format=network.memory_format)  # pyright: ignore


def _refuse(error: Exception | str, status: int = 2, watch: Watch | None = None) -> int:
    """Print an error, and return the status. An error that all processes find is printed once."""
    if watch:
        is_first = watch.is_first_to_say(str(error))
    else:  # before the processes have found each other
        is_first = not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first:
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    start()
    sys.exit(run(sys.argv[1:]))
