"""How torch.compile takes a training step of eight processes: graphs, breaks and operations.

    python -m benchmarks.graphs                     # the working tree, a minute
    python -m benchmarks.graphs --commit 98f566d    # a commit's files

The model is wrapped in DistributedDataParallel by a process that takes itself for one of eight, and
compiled as main.py does it: the network where the commit has a BatchNorm of its own that shares its
statistics, and else, as Composer does, DDP's forward pass, with torch's SyncBatchNorm. That has
five operations for GPUs alone; on this CPU others stand in for them, which are compiled no more.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any, cast

from benchmarks.commits import files_of

RANKS = 8


def stand_in_for_sync_batch_norm() -> None:
    """Let torch's SyncBatchNorm run on a CPU, for what is compiled, not for its numbers."""
    import torch
    from torch import nn

    channels = (1, -1, 1, 1)

    def stats(x: Any, eps: float) -> Any:
        return x.float().mean((0, 2, 3)), (x.float().var((0, 2, 3)) + eps).rsqrt()

    def gather(x: Any, mean: Any, invstd: Any, *_: Any) -> Any:
        return mean[0].clone(), invstd[0].clone()

    def normalise(x: Any, weight: Any, bias: Any, mean: Any, invstd: Any, eps: float) -> Any:
        scale = (invstd * weight).view(channels)
        return ((x - mean.view(channels)) * scale + bias.view(channels)).to(x.dtype)

    def reduce(grad: Any, x: Any, mean: Any, invstd: Any, *_: Any) -> Any:
        sums, products = grad.sum((0, 2, 3)), (grad * (x - mean.view(channels))).sum((0, 2, 3))
        return sums, products, products * invstd, sums

    def backward_elemt(grad: Any, x: Any, mean: Any, invstd: Any, weight: Any, *_: Any) -> Any:
        return grad * (invstd * weight).view(channels)

    library = torch.library.Library("aten", "IMPL")
    for name, function in (
        ("batch_norm_stats", stats),
        ("batch_norm_gather_stats_with_counts", gather),
        ("batch_norm_elemt", normalise),
        ("batch_norm_backward_reduce", reduce),
        ("batch_norm_backward_elemt", backward_elemt),
    ):
        library.impl(name, torch._dynamo.disable(function), "CPU")
    globals()["_library"] = library  # its operations end with it

    def with_cpu(constants: tuple) -> tuple:
        return tuple(
            with_cpu(c) if isinstance(c, tuple) else "cpu" if c == "cuda" else c for c in constants
        )

    code = nn.SyncBatchNorm.forward.__code__
    nn.SyncBatchNorm.forward.__code__ = code.replace(co_consts=with_cpu(code.co_consts))

    class Done:
        def wait(self, *_: Any) -> bool:
            return True

    def gather_all(self: Any, out: Any, given: Any, *_: Any) -> Any:
        out.copy_(given.flatten().repeat(out.numel() // given.numel()).view_as(out))
        return Done()

    group: Any = torch.distributed.ProcessGroup
    for name in ("_allgather_base", "all_gather_single"):  # torch 2.7.0's, and 2.13.0's
        setattr(group, name, torch._dynamo.disable(gather_all))
    ddp: Any = nn.parallel.DistributedDataParallel
    ddp._passing_sync_batchnorm_handle = lambda *_: None


def measure(arch: str, size: int) -> dict[str, Any]:
    """Train and evaluate; return what was compiled."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch._dynamo.utils import counters
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from model import build_composer_deeplabv3

    try:
        from networks.batch_norm import share_statistics
    except ImportError:
        share_statistics = None
    model = build_composer_deeplabv3(150, arch, sync_bn=False, dice_weight=1.0, upsample=False)
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    convs = sum(type(module) is nn.Conv2d for module in model.modules())
    if share_statistics is not None:
        share_statistics(model.module, cast(Any, dist.group.WORLD))
    else:
        stand_in_for_sync_batch_norm()
        model.module = nn.SyncBatchNorm.convert_sync_batchnorm(model.module, dist.group.WORLD)
    # torch's overloads of `to` leave out the memory format.
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    graphs: list[int] = []
    convolutions: list[int] = []

    def backend(graph: Any, example: Any) -> Any:
        kinds = ("call_function", "call_module", "call_method")
        nodes = [node for node in graph.graph.nodes if node.op in kinds]
        graphs.append(len(nodes))
        convolutions.append(sum("conv2d" in str(node.target) for node in nodes))
        return graph.forward

    if share_statistics is not None:
        model.module.compile(backend=backend, dynamic=False)
    ddp: Any = nn.parallel.DistributedDataParallel(model)

    def no_reduction(state, bucket):  # with annotations torch wants its own types
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, no_reduction)
    if share_statistics is None:
        compiled = torch.compile(ddp, backend=backend, dynamic=False)
        ddp.forward = compiled.dynamo_ctx(ddp.forward)
    image = torch.randn(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    batch = image, torch.randint(0, 150, (2, size, size))
    for _ in range(2):
        model.loss(ddp(batch), batch)["total"].backward()
    training = list(graphs)
    breaks = sum(counters["graph_break"].values())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ddp(batch)
    names = collections.Counter(event.name for event in profiler.events() or ())
    ddp.eval()
    before = len(graphs)
    with torch.no_grad():
        model.eval_forward(batch)
    return {
        "BatchNorms": norms,
        "convolutions, but for three of the head's": convs,
        "graphs of training": len(training),
        "operations in them": sum(training),
        "of the largest": max(training),
        "convolutions in them": sum(convolutions[: len(training)]),
        "breaks": breaks,
        "boolean indexings a pass, for which a GPU's host waits": names["aten::nonzero"],
        "graphs of evaluation": len(graphs) - before,
    }


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="resnet101")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--commit", help="measure its files instead")
    args = parser.parse_args(argv)
    with files_of(args.commit) as name:
        found = measure(args.arch, args.size)
    print(f"| {args.arch}, {RANKS} processes | {name} |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    main()
