"""SyncBatchNorm on two ranks gives the gradients and statistics of one rank."""

from __future__ import annotations

import faulthandler
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from networks.batch_norm import (
    count_batches,
    share_statistics,
    stop_counting,
)
from tests.support.batch_norm import KINDS, make_batch, make_network
from tests.support.forked import call_on_two_ranks

SHARES = {"even": (2, 2), "uneven": (3, 1)}


def train(network: nn.Module, batch: tuple[Tensor, Tensor], ranks: int) -> dict[str, Tensor]:
    """Return gradients and buffers after two steps; the loss is summed over the full batch."""
    images, weights = batch
    layers = stop_counting(network)
    for _ in range(2):
        network.zero_grad()
        count_batches(layers)
        # DistributedDataParallel averages gradients over the ranks, so multiply by their number.
        (network(images) * weights * ranks).sum().backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {
        k.removeprefix("module."): v for k, v in (gradients | dict(network.named_buffers())).items()
    }


def train_on_rank(folder: str) -> None:
    """Train as one of two ranks; save its gradients and buffers."""
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
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
            results = train(ddp, (images, weights), ranks=2)
            torch.save(results, f"{folder}/{name}-{compiled}-{rank}.pt")
    for kind in KINDS:
        network = make_network(kind)
        share_statistics(network, dist.group.WORLD)
        images, weights = (part.split([3, 1])[rank] for part in make_batch())
        ddp = nn.parallel.DistributedDataParallel(network)
        ddp.broadcast_buffers = False
        torch.save(train(ddp, (images, weights), ranks=2), f"{folder}/{kind}-{rank}.pt")
    # Delete DDP first. If it were the last owner of the process group, it would wait for gloo's
    # thread while holding the interpreter's lock, and could wait forever.
    del ddp
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results() -> Any:
    """Train on two ranks; yield the folder with their gradients and buffers."""
    with tempfile.TemporaryDirectory() as folder:
        call_on_two_ranks(train_on_rank, folder)
        yield Path(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_norm_variant_on_two_ranks_equals_one_rank(results: Path, kind: str) -> None:
    expected = train(make_network(kind), make_batch(), ranks=1)
    actual, other = (torch.load(results / f"{kind}-{rank}.pt") for rank in range(2))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], other[name]) for name in actual if "num_" in name)
    assert actual.pop("3.bias").abs().max() < 1e-3 * expected["3.weight"].abs().max()
    for name, value in actual.items():
        distance = (value - expected[name]).double().norm() / expected[name].double().norm()
        assert distance < 1e-5, (name, distance)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shares", SHARES)
def test_sync_batch_norm_on_two_ranks_equals_one_rank(
    results: Path, shares: str, compiled: bool
) -> None:
    expected = train(make_network(), make_batch(), ranks=1)
    actual, other = (torch.load(results / f"{shares}-{compiled}-{rank}.pt") for rank in range(2))
    assert actual.keys() == expected.keys()
    assert all(actual[f"{layer}.num_batches_tracked"] == 2 for layer in (1, 4))
    # The buffers of both ranks are bit-identical, so they need not be broadcast.
    buffers = dict(make_network().named_buffers())
    assert all(torch.equal(actual[name], other[name]) for name in buffers)
    # The gradient of a bias before a BatchNorm layer is 0 except for rounding.
    assert actual.pop("3.bias").abs().max() < 1e-3 * expected["3.weight"].abs().max()
    for name, value in actual.items():
        distance = (value - expected[name]).double().norm() / expected[name].double().norm()
        assert distance < 1e-5, (name, distance)
