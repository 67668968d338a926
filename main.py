"""Train or evaluate DeepLabV3+ as a YAML says.

composer main.py yamls/deeplabv3.yaml                             # every GPU of this machine
composer main.py yamls/deeplabv3.yaml recipe_name=mild seed=1     # keys of the YAML, overridden
python main.py --help                                             # the keys
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from config import Config, ConfigError, DatasetConfig, help_text, load, resolve

if TYPE_CHECKING:
    from composer import Trainer
    from composer.core import Callback, DataSpec
    from composer.loggers import LoggerDestination
    from omegaconf import DictConfig
    from torch import Tensor

    from checkpoints import Checkpoints

log = logging.getLogger(__name__)

STOPPED = 75  # exit status of a run that was told to stop: EX_TEMPFAIL of sysexits.h, try again


def main(config: DictConfig | dict[str, Any]) -> Trainer:
    """Train (or, with ``is_train: false``, evaluate) as the config says.

    Args:
        config: The YAML as OmegaConf loads it; see config.py for the keys.

    Returns:
        Trainer: After the run; the network is ``trainer.state.model.module``.

    Raises:
        ConfigError: The config is wrong.
        DataError: The data set is.
        ModelError: The model cannot be built, or its weights cannot be had.
        WeightsError: A checkpoint is damaged, or holds what is no part of one.
        RunError: Training cannot go on, or was told to stop (``checkpoints.Stopped``).
    """
    config = resolve(config)
    trainer = build_trainer(config)
    if not config.is_train:
        trainer.eval()
        return trainer
    saver = trainer._checkpoint_saver
    with saver.listening() if saver else nullcontext():
        _train(config, trainer, saver)
    return trainer


def _train(config: Config, trainer: Trainer, saver: Checkpoints | None) -> None:
    """Train to the end, with the evaluations that are due before."""
    first = config.eval_first and trainer.state.timestamp.batch == 0
    complete = trainer.state.timestamp >= trainer.state.max_duration
    if first or complete or (saver and saver.evaluation_due):
        trainer.eval()
    if first:
        trainer.first_miou = float(trainer.state.eval_metric_values["MIoU"])
    if complete:
        log.warning("nothing is left to train: max_duration=%s is reached", config.max_duration)
    else:
        trainer.fit()
    if saver:
        saver.finish()


def build_trainer(config: Config) -> Trainer:
    """What :func:`main` does before the first step; it raises what that does."""
    level = (config.python_log_level or "warning").upper()
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")

    # Only now what takes seconds to import: a wrong config has been answered by here.
    import torch
    from composer import Trainer
    from composer.utils import dist, get_device, reproducibility

    from model import build_composer_deeplabv3, weight_init
    from optimizer import DecoupledSGDW
    from recipes import build_recipe, warn_if_ema_is_slow

    precision, cpu_autocast = _precision(config.precision)
    device = get_device(None)
    if dist.get_world_size() > 1:
        dist.initialize_dist(device)
    reproducibility.seed_all(config.seed)
    saver = _build_saver(config)
    scratch = tempfile.TemporaryDirectory(prefix="checkpoint-")
    checkpoint, weights = _read_checkpoint(config, saver, scratch.name)

    train_data = _build_data(config, config.train_dataset, "train") if config.is_train else None
    eval_data = _build_data(config, config.eval_dataset, "val")
    if train_data is not None:
        batches_per_epoch = len(train_data.dataloader)
        warn_if_ema_is_slow(config, batches_per_epoch, config.train_dataset.batch_size)

    model_config = asdict(config.model)
    if checkpoint or weights:
        model_config["backbone_weights"] = None  # the checkpoint has better ones
    model = build_composer_deeplabv3(**model_config, init_fn=weight_init, upsample=False)
    if weights is not None:
        model.module.load_state_dict(weights)
    model.to(memory_format=torch.channels_last)
    model.cpu_autocast = cpu_autocast
    optimizer = DecoupledSGDW(model.parameters(), **asdict(config.optimizer))
    algorithms, scheduler = build_recipe(config)

    microbatch: int | str = config.device_train_microbatch_size
    if microbatch == "auto" and not torch.cuda.is_available():
        microbatch = config.train_dataset.batch_size // dist.get_world_size()
    compile_model = compiles(config)
    if compile_model:
        model.eval_batch_size = config.eval_dataset.batch_size // dist.get_world_size()
    torch.backends.cudnn.benchmark = not config.deterministic  # sizes do not change
    # What Composer is about to unpickle is looked at first; see weights.py.
    os.environ["CHECKPOINT_VALIDATION_FUNCTION"] = "weights.validate_checkpoint"
    trainer = Trainer(
        run_name=config.run_name,
        model=model,
        train_dataloader=train_data,
        eval_dataloader=eval_data,
        eval_interval=saver.eval_interval if saver else config.eval_interval,
        max_duration=config.max_duration,
        optimizers=optimizer,
        schedulers=scheduler if config.is_train else None,  # which needs the length of an epoch
        algorithms=algorithms,
        callbacks=[*_build_callbacks(config), *([saver] if saver else [])],
        loggers=_build_loggers(config),
        progress_bar="progress_bar" in config.loggers,
        log_to_console="console" in config.loggers,
        console_log_interval=config.loggers.get("console", {}).get("log_interval", "1ba"),
        load_path=checkpoint,
        spin_dataloaders=False,  # the order of samples does not depend on what was read before
        device=device,
        precision=precision,
        device_train_microbatch_size=microbatch,
        deterministic_mode=config.deterministic,
        seed=config.seed,
        compile_config={"dynamic": False} if compile_model else None,
        python_log_level=config.python_log_level,
    )
    scratch.cleanup()
    trainer.logger.log_hyperparameters(asdict(config))
    return trainer


def _precision(name: str) -> tuple[str, Any]:
    """Composer's precision, and the autocast type of the model on a CPU, which Composer has not."""
    import torch

    if torch.cuda.is_available():
        if name == "auto":
            # Not emulated: a V100 or T4 takes bf16 only slowly.
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            name = "amp_bf16" if native else "amp_fp16"
        return name, None
    if name == "amp_fp16":
        raise ConfigError("precision: amp_fp16 needs a GPU; use auto, fp32 or amp_bf16 here")
    if name == "auto":
        name = "amp_bf16" if _cpu_has_bf16() else "fp32"
    return "fp32", torch.bfloat16 if name == "amp_bf16" else None


def compiles(config: Config) -> bool:
    """Whether a run compiles the model here."""
    import torch

    return config.compile is True or (config.compile == "auto" and torch.cuda.is_available())


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 numbers itself (x86 and Arm Linux name it alike)."""
    try:
        with open("/proc/cpuinfo") as file:
            return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", file.read()) is not None
    except OSError:
        return False


def _build_data(config: Config, dataset: DatasetConfig, split: str) -> DataSpec:
    """The data of a split for this process, after a look at whether its labels fit the model."""
    from composer.utils import dist

    from data import build_ade20k_dataspec
    from validate import check_labels
    from watch import LoaderContext, init_worker

    arguments = asdict(dataset)
    arguments["batch_size"] //= dist.get_world_size()
    if split == "val":
        arguments["drop_last"] = False  # every sample is scored once
    if not dataset.is_streaming:
        check_labels(
            dataset.path,
            split,
            config.model.num_classes,
            dataset.ignore_background,
            ignore_label=dataset.ignore_label,
        )
    if arguments["num_workers"] != 0 and sys.platform == "linux":
        arguments |= {"worker_init_fn": init_worker, "multiprocessing_context": LoaderContext()}
    return build_ade20k_dataspec(
        **arguments,
        split=split,
        shuffle=split == "train",
        seed=config.seed,
        num_classes=config.model.num_classes,
    )


def _build_saver(config: Config) -> Checkpoints | None:
    """What saves checkpoints, after a look at whether they can be saved."""
    from checkpoints import Checkpoints

    if not config.save_folder or not config.is_train:
        return None
    saver = Checkpoints(
        config.save_folder,
        config.save_interval,
        config.eval_interval,
        config.save_num_checkpoints_to_keep,
        config.save_overwrite,
        config.autoresume,
    )
    saver.check()
    return saver


def _read_checkpoint(
    config: Config, saver: Checkpoints | None, scratch: str
) -> tuple[str | None, dict[str, Tensor] | None]:
    """What to begin from: the newest checkpoint for ``autoresume``, else that of ``load_path``.

    Returns:
        A local path where the state of training is wanted, or the weights where only these are.
        Its architecture is that of ``config.model``.
    """
    from checkpoints import local_copy, newest_checkpoint
    from weights import infer_architecture, load_weights

    found = newest_checkpoint(config.save_folder, scratch) if config.autoresume else None
    weights_only = not config.is_train or (config.load_weights_only and not found)
    if found and saver:
        saver.last = found[0]
    if not found:
        if not config.load_path:
            return None, None
        found = config.load_path, local_copy(config.load_path, scratch)
    where, path = found
    state = load_weights(path).state
    for name, value in infer_architecture(state).items():
        wanted = getattr(config.model, name)
        if value != wanted:
            raise ConfigError(f"load_path: {where} has {name}={value}, not {wanted}")
    return (None, state) if weights_only else (path, None)


def _build_callbacks(config: Config) -> list[Callback]:
    """What watches the run: speed, learning rate, memory, and what callbacks.py draws."""
    import torch
    from composer.callbacks import LRMonitor, MemoryMonitor, SpeedMonitor

    from callbacks import ClassTable, Curves, Pictures, RunRecord, TrainMIoU
    from classes import load_classes
    from watch import StopAtNonFiniteLoss

    num_classes = config.model.num_classes
    classes = load_classes(config.class_names, num_classes)
    folder = config.save_folder
    callbacks: list[Callback] = [
        StopAtNonFiniteLoss(),
        SpeedMonitor(window_size=20),
        LRMonitor(),
    ]
    if torch.cuda.is_available():
        callbacks.append(MemoryMonitor())
    if config.pictures:
        callbacks.append(Pictures(classes, config.pictures, folder))
    if config.train_metrics_interval:
        callbacks.append(TrainMIoU(config.train_metrics_interval, num_classes))
    if folder:
        callbacks.append(Curves(folder))
    return [
        *callbacks,
        ClassTable(classes, folder if config.class_table_csv else None),
        RunRecord(asdict(config), classes),
    ]


def _build_loggers(config: Config) -> list[LoggerDestination]:
    """Composer's loggers by their names in the YAML; the progress bar and console are Trainer's."""
    from composer import loggers

    classes = {
        "file": loggers.FileLogger,
        "wandb": loggers.WandBLogger,
        "tensorboard": loggers.TensorboardLogger,
        "mlflow": loggers.MLFlowLogger,
        "comet_ml": loggers.CometMLLogger,
        "neptune": loggers.NeptuneLogger,
    }
    # Offline, W&B 0.18 otherwise asks its server about every table and waits for the answer.
    os.environ.setdefault("WANDB_ALLOW_OFFLINE_ARTIFACTS", "false")
    built = []
    for name, arguments in config.loggers.items():
        if name in classes:
            try:
                built.append(classes[name](**arguments))
            except TypeError as error:
                raise ConfigError(f"loggers.{name}: {error}") from error
    return built


def _summary(trainer: Trainer) -> str:
    """What the run reached and left behind, a line each."""
    from callbacks import Pictures

    lines = []
    miou = trainer.state.eval_metric_values.get("MIoU")
    if miou is not None:
        before = getattr(trainer, "first_miou", None)
        lines.append(f"mIoU: {'' if before is None else f'{before:.2f} before, '}{miou:.2f} now")
    if trainer.saved_checkpoints:
        lines.append(f"checkpoint: {trainer.saved_checkpoints[-1]}")
    for callback in trainer.state.callbacks:
        if isinstance(callback, Pictures) and callback.latest:
            lines.append(f"pictures: {callback.latest}")
    return "\n".join(lines)


def run(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    try:
        config = load(arguments[0], arguments[1:])
        resolve(config)
    except ConfigError as error:
        return _refuse(error)
    from checkpoints import Stopped
    from classes import ClassError
    from data import DataError
    from model import ModelError
    from watch import end_with_launcher, explain
    from weights import WeightsError

    end_with_launcher()
    try:
        trainer = main(config)
    except Stopped as stop:
        if os.environ.get("RANK", "0") == "0":
            print(stop)
        return STOPPED
    except (ConfigError, DataError, ModelError, WeightsError, ClassError) as error:
        return _refuse(error)
    except RuntimeError as error:
        line = explain(error)
        if line is None:
            raise
        return _refuse(line, 1)
    summary = _summary(trainer)
    trainer.close()  # and with it the progress bar
    if os.environ.get("RANK", "0") == "0":
        print(summary)
    return 0


def _refuse(error: Exception | str, status: int = 2) -> int:
    """Say what was wrong, once a node if all processes found it together; the exit status."""
    together = isinstance(error, ConfigError)
    if not together or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
