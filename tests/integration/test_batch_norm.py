"""Compiled training with SyncBatchNorm has no graph breaks and no recompilations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from model import ComposerDeepLabV3, build_composer_deeplabv3
from networks.batch_norm import (
    SyncBatchNorm2d,
    share_statistics,
)
from segmentation.losses import MixedTarget


@pytest.fixture
def model(small_network: None) -> ComposerDeepLabV3:
    return build_composer_deeplabv3(12, "resnet50", dice_weight=1.0, upsample=False)


@pytest.fixture
def one_of_eight(model: ComposerDeepLabV3) -> Iterator[dist.ProcessGroup]:
    """Simulate a process group of eight ranks in which this process is rank 0."""
    torch._dynamo.reset()
    counters.clear()
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()
    torch._dynamo.reset()


def test_sync_batch_norm_compiles_without_graph_breaks(
    model: ComposerDeepLabV3, one_of_eight: dist.ProcessGroup
) -> None:
    share_statistics(model.module, one_of_eight)
    layers = sum(isinstance(module, SyncBatchNorm2d) for module in model.modules())
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    model.module.compile(backend=backend, dynamic=False)
    ddp = nn.parallel.DistributedDataParallel(model)

    def no_reduction(state, bucket):  # not annotated, because torch would require its own types
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

    assert step(target) >= 1
    new_graphs = {"again": step(target)}
    for mixing in (0.1, 0.3):
        new_graphs[f"MixUp {mixing}"] = step(MixedTarget(target, target.flip(0), mixing))
    new_graphs["SAM"] = step(target, is_first_of_two=True) + step(target)
    ddp.eval()
    model.eval_batch_size = 2
    with torch.no_grad():
        for name, count in (("evaluation", 2), ("a short last batch", 1)):
            before = len(graphs)
            model.eval_forward((image[:count], target[:count]))
            new_graphs[name] = len(graphs) - before
    ddp.train()
    new_graphs["training after it"] = step(target)
    assert new_graphs.pop("evaluation") == 1
    assert new_graphs == dict.fromkeys(new_graphs, 0)
    assert sum(counters["graph_break"].values()) == 0
    assert sum(graphs) == layers > 10  # The graphs contain the all-reduce of every layer.
