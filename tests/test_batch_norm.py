"""Statistics shared by processes: the numbers of one process, in one graph."""

from __future__ import annotations

import contextlib
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
    SyncBatchNorm2d,
    count_batches,
    share_statistics,
    stop_counting,
)

pytestmark = pytest.mark.processes

SHARES = {"even": (2, 2), "uneven": (3, 1)}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not affine": {"affine": False},
    "cumulative": {"momentum": None},
    "without statistics": {"track_running_stats": False},
}


def make_network(kind: str = "plain") -> nn.Sequential:
    """Two normalised layers, of which the second sees a mean far from 0."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16, **KINDS[kind]),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, padding=1),
        nn.BatchNorm2d(8, **{"momentum": 0.3, **KINDS[kind]}),
        nn.Conv2d(8, 4, 1),
    )
    nn.init.constant_(network[3].bias, 30.0)
    return network


def make_batch() -> tuple[Tensor, Tensor]:
    """Images, and what the loss weighs the outputs with."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 16, 16, generator=generator) * 2 + 1
    return images, torch.randn(4, 4, 16, 16, generator=generator)


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


def test_evaluation_and_names_are_batch_norms() -> None:
    network, (images, _) = make_network(), make_batch()
    expected, names = network.eval()(images), list(network.state_dict())
    share_statistics(network, type("Group", (), {"group_name": "0"})())
    assert isinstance(network[1], SyncBatchNorm2d) and not network[1].training
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), expected)


def test_batches_are_counted_as_torch_does() -> None:
    network, theirs, (images, _) = make_network(), make_network(), make_batch()
    layers = stop_counting(network)
    for frozen in (False, True):
        if frozen:
            for each in (network, theirs):
                each[1].eval()
        count_batches(layers)
        assert torch.equal(network(images), theirs(images))
    state = theirs.state_dict()
    assert network.state_dict().keys() == state.keys()
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name


def count_graphs(rank: int, path: str) -> None:
    """In a process that takes itself for one of eight: what training and evaluation compile."""
    faulthandler.dump_traceback_later(300, exit=True)
    from torch._dynamo.utils import counters
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from benchmarks.forked import shrink
    from model import build_composer_deeplabv3
    from segmentation.losses import MixedTarget

    shrink()
    model = build_composer_deeplabv3(12, "resnet50", dice_weight=1.0, upsample=False)
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    share_statistics(model.module, dist.group.WORLD)
    layers = sum(isinstance(module, SyncBatchNorm2d) for module in model.modules())
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model.module.compile(backend=backend, dynamic=False)
    ddp = nn.parallel.DistributedDataParallel(model)

    def no_reduction(state, bucket):  # with annotations torch wants its own types
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, no_reduction)
    image = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.randint(-1, 12, (2, 32, 32))

    def step(target: Any, is_first_of_two: bool = False) -> int:
        before = len(graphs)
        with ddp.no_sync() if is_first_of_two else contextlib.nullcontext():
            batch = image, target
            model.loss(ddp(batch), batch)["total"].backward()
        return len(graphs) - before

    new = {"training": step(target), "again": step(target)}
    for mixing in (0.1, 0.3):
        new[f"MixUp {mixing}"] = step(MixedTarget(target, target.flip(0), mixing))
    new["SAM"] = step(target, is_first_of_two=True) + step(target)
    ddp.eval()
    model.eval_batch_size = 2
    with torch.no_grad():
        for name, count in (("evaluation", 2), ("a short last batch", 1)):
            before = len(graphs)
            model.eval_forward((image[:count], target[:count]))
            new[name] = len(graphs) - before
    ddp.train()
    new["training after it"] = step(target)
    breaks = sum(counters["graph_break"].values())
    torch.save({"new": new, "breaks": breaks, "all_reduces": sum(graphs), "layers": layers}, path)


def test_training_has_no_breaks_and_evaluation_one_graph(tmp_path: Path) -> None:
    mp.spawn(count_graphs, args=(str(tmp_path / "found.pt"),), nprocs=1)
    found = torch.load(tmp_path / "found.pt")
    assert found["breaks"] == 0
    new = found["new"]
    assert new.pop("training") >= 1 and new.pop("evaluation") == 1
    assert new == dict.fromkeys(new, 0)
    assert found["all_reduces"] == found["layers"] > 10  # every layer's is in a graph
