"""Statistics shared by processes: the numbers of one process, in one graph."""

from __future__ import annotations

import contextlib
import faulthandler
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from networks.batch_norm import (
    SyncBatchNorm2d,
    share_statistics,
)


def count_graphs(rank: int, path: str) -> None:
    """In a process that takes itself for one of eight: what training and evaluation compile."""
    faulthandler.dump_traceback_later(300, exit=True)
    from torch._dynamo.utils import counters
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from model import build_composer_deeplabv3
    from segmentation.losses import MixedTarget
    from tests.support.forked import shrink

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
