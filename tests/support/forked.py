"""Runs of main.py in separate processes that can kill themselves at a chosen moment.

Each process is forked from a copy of this process. This saves ten seconds of imports.
"""

from __future__ import annotations

import importlib
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

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


def run(config: dict[str, Any], log: str, death: Death | None = None) -> int:
    """Run main.py in one process; return its exit status, negative if a signal ended it."""
    return run_ranks(config, log, 1, death)[0]


def run_ranks(
    config: dict[str, Any], log: str, ranks: int, death: Death | None = None
) -> list[int]:
    """Run main.py in several processes on this machine; return their exit statuses.

    Args:
        config: Content of the YAML config.
        log: File for the logged values, one JSON line per value. Output goes to `{log}.{rank}.out`.
        ranks: Number of processes.
        death: Signal that the last process sends itself and the moment to send it, or None.
    """
    deaths = [None] * (ranks - 1) + [death]
    return _call_on_ranks(_child, [(config, log, deaths[rank], rank) for rank in range(ranks)])


def call_on_two_ranks(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function of a module in two forked processes, which have the variables of ranks."""
    assert _call_on_ranks(function, [arguments, arguments]) == [0, 0]


def start_server() -> None:
    """Fork a copy of this process. The copy forks the processes of later calls.

    Call this function once, after the modules are imported and before a test changes this process.
    """
    global _server
    _server, connection = multiprocessing.Pipe()
    if os.fork() == 0:
        _server.close()
        try:
            _serve(connection)
        finally:
            os._exit(0)
    connection.close()


_server: Connection | None = None


def _call_on_ranks(function: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> list[int]:
    if _server is None:  # In a benchmark, tests/conftest.py has not started the server.
        start_server()
    assert _server is not None
    _server.send((function, arguments))
    return _server.recv()


def _serve(connection: Connection) -> None:
    """Run each received function in one forked process per rank; send back the exit statuses."""
    import torch  # The process that distributes the tests does not need torch.

    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:  # The test process has ended.
            return
        for name in IMPORTS:
            importlib.import_module(name)
        port = _free_port()
        processes = [
            context.Process(target=_call, args=(rank, len(arguments), port, function, one))
            for rank, one in enumerate(arguments)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        connection.send([process.exitcode for process in processes])


def _call(
    rank: int, ranks: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    if ranks > 1:
        distributed = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "NODE_RANK": 0}
        distributed |= {"LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in distributed.items()})
    function(*arguments)


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
