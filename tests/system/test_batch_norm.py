"""Statistics shared by processes: the numbers of one process, in one graph."""

from __future__ import annotations

import faulthandler
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from networks.batch_norm import (
    count_batches,
    share_statistics,
    stop_counting,
)
from tests.support.batch_norm import KINDS, make_batch, make_network

SHARES = {"even": (2, 2), "uneven": (3, 1)}


def train(network: nn.Module, batch: tuple[Tensor, Tensor], ranks: int) -> dict[str, Tensor]:
    """Gradients and buffers after two passes, with the loss of the whole batch."""
    images, weights = batch
    layers = stop_counting(network)
    for _ in range(2):
        network.zero_grad()
        count_batches(layers)
        # DistributedDataParallel takes the mean over the ranks.
        (network(images) * weights * ranks).sum().backward()
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {
        k.removeprefix("module."): v for k, v in (found | dict(network.named_buffers())).items()
    }


def on_rank(rank: int, port: int, folder: str) -> None:
    """One of two processes, which writes what came out."""
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name, shares in SHARES.items():
        for compiled in (False, True):
            network = make_network()
            share_statistics(network, dist.group.WORLD)
            if compiled:
                network.compile(backend="aot_eager", dynamic=False, fullgraph=True)
            images, weights = (part.split(list(shares))[rank] for part in make_batch())
            ddp = nn.parallel.DistributedDataParallel(network)
            ddp.broadcast_buffers = False
            assert not ddp.will_sync_module_buffers()
            found = train(ddp, (images, weights), ranks=2)
            torch.save(found, f"{folder}/{name}-{compiled}-{rank}.pt")
    for kind in KINDS:
        network = make_network(kind)
        share_statistics(network, dist.group.WORLD)
        images, weights = (part.split([3, 1])[rank] for part in make_batch())
        ddp = nn.parallel.DistributedDataParallel(network)
        ddp.broadcast_buffers = False
        torch.save(train(ddp, (images, weights), ranks=2), f"{folder}/{kind}-{rank}.pt")
    # Were it the last to have the process group, it would wait for gloo's thread without letting
    # that have the interpreter's lock, for ever if it needs it.
    del ddp
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Any:
    """The folder with what two processes came to."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        mp.spawn(on_rank, args=(port, folder), nprocs=2)
        yield Path(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_has_the_numbers_of_one_process(results: Path, kind: str) -> None:
    expected = train(make_network(kind), make_batch(), ranks=1)
    found, other = (torch.load(results / f"{kind}-{rank}.pt") for rank in range(2))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], other[name]) for name in found if "num_" in name)
    assert found.pop("3.bias").abs().max() < 1e-3 * expected["3.weight"].abs().max()
    for name, value in found.items():
        distance = (value - expected[name]).double().norm() / expected[name].double().norm()
        assert distance < 1e-5, (name, distance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shares", SHARES)
def test_two_processes_have_the_numbers_of_one(results: Path, shares: str, compiled: bool) -> None:
    expected = train(make_network(), make_batch(), ranks=1)
    found, other = (torch.load(results / f"{shares}-{compiled}-{rank}.pt") for rank in range(2))
    assert found.keys() == expected.keys()
    assert all(found[f"{layer}.num_batches_tracked"] == 2 for layer in (1, 4))
    # To the bit, so that nothing need be sent around.
    buffers = dict(make_network().named_buffers())
    assert all(torch.equal(found[name], other[name]) for name in buffers)
    # That of the bias before a BatchNorm is 0 but for rounding.
    assert found.pop("3.bias").abs().max() < 1e-3 * expected["3.weight"].abs().max()
    for name, value in found.items():
        distance = (value - expected[name]).double().norm() / expected[name].double().norm()
        assert distance < 1e-5, (name, distance)
