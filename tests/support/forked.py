"""Runs of main.py in separate processes that can kill themselves at a chosen moment.

Each process is forked from one that has imported all modules, which saves ten seconds per run.
"""

from __future__ import annotations

import importlib.util
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tests.support.paths import ROOT

IMPORTS = ["main", "model", "data"]
IMPORTS += ["training.recipes", "training.optimizer", "training.callbacks", "training.loggers"]
IMPORTS += ["training.ema", "training.sam", "training.mixup", "training.report", "training.watch"]
IMPORTS += ["checkpointing.saver", "checkpointing.resume", "checkpointing.weights"]
IMPORTS += ["dataset.shards", "tests.support.warm_up"]
# From "write" on, the moments are within a save: a half-written file, before the renames of the
# checkpoint, best checkpoint and pointer, and before an old checkpoint is removed.
MOMENTS = ("forward", "batch", "eval", "write", "rename", "best", "pointer", "remove")


class Death(NamedTuple):
    """A signal that a run gets when one of `MOMENTS` occurs for the n-th time."""

    moment: str
    number: int  # Number of earlier occurrences to skip.
    signal: int = signal.SIGKILL
    times: int = 1  # Number of consecutive occurrences at which the signal is sent.
    is_loaders: bool = False  # True if a loader process gets the signal instead of the run.


def start(
    config: dict[str, Any],
    log: str,
    death: Death | None = None,
    rank: int = 0,
    ranks: int = 1,
    port: int = 0,
) -> Any:
    """Start main.py in a process forked from one that has imported all modules.

    Args:
        config: Content of the YAML config.
        log: File for the logged values, one JSON line per value. Output goes to `{log}.{rank}.out`.
        death: Signal that the process sends itself, and when; None sends no signal.
        rank: Rank of the process.
        ranks: Number of processes, all on this machine.
        port: Port of the rendezvous of the processes.

    Returns:
        The multiprocessing.Process.
    """
    return _start(_child, (config, log, death, rank), rank, ranks, port)


def run(config: dict[str, Any], log: str, death: Death | None = None) -> int:
    """Run main.py in one process; return its exit status, negative if a signal ended it."""
    return run_ranks(config, log, 1, death)[0]


def run_ranks(
    config: dict[str, Any], log: str, ranks: int, death: Death | None = None
) -> list[int]:
    """Run main.py in several processes, with `death` in the last; return their exit statuses."""
    deaths, port = [None] * (ranks - 1) + [death], _free_port()
    return _statuses([start(config, log, deaths[r], r, ranks, port) for r in range(ranks)])


def call_on_two_ranks(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module in two forked processes, which have the variables of ranks."""
    port = _free_port()
    assert _statuses([_start(function, arguments, rank, 2, port) for rank in (0, 1)]) == [0, 0]


def _start(
    function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, ranks: int, port: int
) -> Any:
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    # The forkserver silently skips modules that do not exist.
    for name in IMPORTS:
        assert importlib.util.find_spec(name), f"there is no module {name}"
    context.set_forkserver_preload(IMPORTS)
    distributed = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "NODE_RANK": 0}
    distributed |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = {key: str(value) for key, value in distributed.items()} if ranks > 1 else {}
    process = context.Process(target=_call, args=(settings, function, arguments))
    process.start()
    return process


def _call(
    settings: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(settings)
    function(*arguments)


def _statuses(processes: Sequence[Any]) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(config: dict[str, Any], log: str, death: Death | None, rank: int) -> None:
    import main

    output = os.open(f"{log}.{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    shrink()
    _skip_drawing()
    callbacks = [_plan_death(death)] if death else []
    loggers = [_make_logger(log)] if rank == 0 else []
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(config, file)  # JSON is valid YAML.
        file.flush()
        status = main.run([file.name], callbacks=callbacks, loggers=loggers)
    sys.exit(status)


def shrink(
    set_attribute: Callable[[Any, str, Any], None] = setattr,
    set_item: Callable[[Any, Any, Any], None] = dict.__setitem__,
) -> None:
    """Shrink resnet50 to 0.2 million parameters, so that saving checkpoints is fast."""
    import torchvision.models.resnet as resnet

    from networks import deeplab

    head = deeplab.DepthwiseSeparableASPPHead

    class SmallResNet(resnet.ResNet):
        def _make_layer(self, block: Any, planes: int, *others: Any, **named: Any) -> Any:
            # DeepLabV3+ expects 256 channels from the first stage, so all stages have 256.
            return super()._make_layer(block, 64, *others, **named)

    def small_resnet(weights: None, **arguments: Any) -> resnet.ResNet:
        return SmallResNet(resnet.Bottleneck, [1, 1, 1, 1], width_per_group=16, **arguments)

    def small_head(**arguments: Any) -> Any:
        return head(**{**arguments, "channels": 32})

    set_attribute(resnet, "resnet50", small_resnet)
    set_attribute(deeplab, "DepthwiseSeparableASPPHead", small_head)
    set_item(deeplab.DEPTHS, (1, 1, 1, 1), "50")
    set_item(deeplab.FAMILIES, (16, 16), "resnet{}")


def _skip_drawing() -> None:
    """Omit the curves from the report: drawing them takes as long as twelve training steps."""
    from training import pictures

    pictures.draw_curves = lambda train, evaluations: b""


def _make_logger(path: str) -> Any:
    from composer.loggers import LoggerDestination

    class Lines(LoggerDestination):
        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
            with open(path, "a") as file:
                for name, value in metrics.items():
                    if name.startswith(("loss/", "metrics/eval/")):
                        file.write(json.dumps([step, name, float(value)]) + "\n")

    return Lines()


def _plan_death(death: Death) -> Any:
    """Make this process send itself a signal as `death` says; return the necessary callback."""
    import torch
    from composer.core import Callback

    from checkpointing import stores

    moment, number = death.moment, death.number

    def count(reached: bool = True) -> None:
        nonlocal number
        number -= reached
        if reached and -death.times <= number < 0:
            loaders = multiprocessing.active_children()
            process = loaders[0].pid if death.is_loaders else os.getpid()
            assert process is not None
            os.kill(process, death.signal)

    class Deadly(Callback):
        def after_forward(self, state: Any, logger: Any) -> None:
            count(moment == "forward")

        def batch_end(self, state: Any, logger: Any) -> None:
            count(moment == "batch")

        def eval_batch_end(self, state: Any, logger: Any) -> None:
            count(moment == "eval")

    save, replace, remove = torch.save, os.replace, os.remove

    def half_save(content: Any, file: Any, **arguments: Any) -> None:
        ours = str(getattr(file, "name", "")).endswith(".unfinished")
        if moment == "write" and ours and number == 0:
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
        count(moment == "write" and ours)
        save(content, file, **arguments)

    def late_replace(source: str, target: str) -> None:
        name = os.path.basename(target)
        count(moment == "rename" and stores.NAME.fullmatch(name) is not None)
        count(moment == "best" and name == stores.BEST)
        count(moment == "pointer" and name == stores.LATEST)
        replace(source, target)

    def late_remove(path: str) -> None:
        count(moment == "remove" and stores.NAME.fullmatch(os.path.basename(path)) is not None)
        remove(path)

    torch.save, os.replace, os.remove = half_save, late_replace, late_remove
    return Deadly()
