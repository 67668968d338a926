"""Counts of GPU launches and bytes for the small parts of a training step, without a GPU.

    python -m benchmarks.studies.counted                    # the working tree, a minute
    python -m benchmarks.studies.counted --commit 98f566d   # the files of a commit
    python -m benchmarks.studies.counted --memory    # also the error of training/microbatch.py

A launch is a PyTorch operation that is not a view, run on tensors without data. For compiled parts,
the launches are the loops that Inductor generates on a CPU. Bytes are those of operands and
results, for a batch of 16 at 512 pixels.

`--memory` compares two values for the memory of an image at the peak of a pass. One is the count of
training/microbatch.py. The other is the memory that AOTAutograd's partition of the compiled network
keeps for the backward pass, without the temporary memory of operations.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.commits import files_of, imported

IMAGES, SIZE = 16, 512


class Launches(TorchDispatchMode):
    """A dispatch mode that counts operations other than views, and the bytes they move."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = self.counters = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_iter(result) if isinstance(t, Tensor)]
        is_view = not func._schema.is_mutable and any(t._is_view() for t in made)
        if not (is_view or "empty" in func.__name__ or "detach" in func.__name__):
            self.count += 1
            self.bytes += sum(t.numel() * t.element_size() for t in given + made)
            numbers = given and all(t.dtype == torch.int64 and t.ndim == 0 for t in given)
            self.counters += bool(numbers and func._schema.is_mutable)
        return result


def transform(distort: bool) -> tuple[int, float]:
    """Return the launches and bytes of DeviceTransform."""
    result = imported("transforms").DeviceTransform(distort=distort)
    if hasattr(result, "compile"):
        return compiled_transform(result)
    shape = (IMAGES, SIZE, SIZE)
    raw = torch.empty(*shape, 3, dtype=torch.uint8, device="meta").permute(0, 3, 1, 2)
    labels = torch.empty(shape, dtype=torch.uint8, device="meta")
    result((raw, labels))  # The first call moves the constants to the device.
    with Launches() as found:
        result((raw, labels))
    return found.count, found.bytes


def compiled_transform(result: Any) -> tuple[int, float]:
    """Return Inductor's loops for one image, and their bytes for all images."""
    from torch._inductor import config, metrics

    # On a GPU, the transform applies every step without a check.
    imported("dataset.color_jitter", "dataset.colors")._any = lambda change: True
    raw = torch.zeros(1, SIZE, SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    numbers = [torch.full((), number) for number in (17, 0)]
    torch._dynamo.reset()
    metrics.reset()
    told = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    told.setLevel(logging.INFO)  # Inductor counts bytes only at this log level.
    told.propagate = False
    with config.patch(fx_graph_cache=False):
        torch.compile(result._transform)(raw, raw[:, 0].contiguous(), *numbers)
    # Two more launches fill in the seed and the epoch.
    return metrics.generated_kernel_count + 2, IMAGES * metrics.num_bytes_accessed


def passes(arch: str) -> Iterator[tuple[str, int]]:
    """Yield the launches for counting batches and averaging weights, and the buffers DDP sends."""
    with torch.device("meta"):
        model = imported("model").build_composer_deeplabv3(150, arch, upsample=False)
    batch = torch.empty(2, 3, 64, 64, device="meta"), None
    with Launches() as forward:
        model(batch)
    yield "counters of a forward pass", forward.counters
    algorithms = imported("training.ema", "training.algorithms", "algorithms")
    ema: Any = algorithms.EMA("100ba")
    ema.ema_model, ema.smoothing = algorithms.EMAParameters(model), 0.9
    with Launches() as update:
        ema._update(model)
    yield "an update of the average", update.count
    source = (Path(str(imported("main").__file__))).read_text()
    sent = 0 if "broadcast_buffers = False" in source else len(list(model.buffers()))
    yield "buffers sent around a pass, on one node", sent


def kept(arch: str, size: int, budget: float) -> tuple[float, float]:
    """Return the bytes of an image that are kept for the backward pass: counted and partitioned."""
    import torch._functorch.config as functorch
    import torch._inductor.lowering  # The decompositions refer to this module.
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._functorch.aot_autograd import aot_function
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode

    memory = imported("training.microbatch", "training.memory")
    with torch.device("meta"):
        network: nn.Module = imported("model").deeplabv3(150, arch)
        network.upsample = False  # pyright: ignore[reportArgumentType]
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    footprint = memory.count(network, size, torch.bfloat16, compiled=True)
    counted = footprint.image - (1 - budget) * footprint.saved
    found = {}

    def forward(graph: Any, example: Any) -> Any:
        outputs = [node.meta["val"] for node in list(graph.graph.nodes)[-1].args[0] if node]
        given = {t.untyped_storage()._cdata for t in example if isinstance(t, Tensor)}
        storages = {
            t.untyped_storage()._cdata: t.untyped_storage().nbytes()
            for t in outputs
            if isinstance(t, Tensor)
        }
        found["bytes"] = sum(size for key, size in storages.items() if key not in given)
        return make_boxed_func(graph.forward)

    images = 4
    with FakeTensorMode(), functorch.patch(activation_memory_budget=budget):
        empty = memory._without_data(network).train()
        names, tensors = zip(*empty.named_parameters(), *empty.named_buffers(), strict=True)

        def run(tensors: Any, photo: Tensor) -> Tensor:
            return torch.func.functional_call(empty, dict(zip(names, tensors)), (photo,))

        function = aot_function(
            run,
            fw_compiler=cast(Any, forward),
            bw_compiler=cast(Any, lambda graph, example: make_boxed_func(graph.forward)),
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        photo = torch.empty(images, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            function(tensors, photo)
    return counted, (found["bytes"] - footprint.fixed) / images


def main(argv: list[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", default="resnet101")
    parser.add_argument("--commit", help="count in its files instead")
    parser.add_argument("--memory", action="store_true", help="compare the memory model, too")
    args = parser.parse_args(argv)
    with files_of(args.commit) as files:
        print(f"| {files} | launches | GB |\n|---|---|---|")
        for distort, name in ((True, "training"), (False, "evaluation")):
            count, size = transform(distort)
            print(f"| DeviceTransform, {name} | {count} | {size / 1e9:.2f} |", flush=True)
        for name, count in passes(args.arch):
            print(f"| {name} | {count} | |", flush=True)
        if args.memory:
            print("\n| activations, GiB an image | counted | kept |\n|---|---|---|")
            for arch, size, budget in (
                (args.arch, 512, 1.0),
                (args.arch, 512, 0.5),
                (args.arch, 256, 1.0),
                ("resnet50", 512, 1.0),
            ):
                counted, partitioned = (each / 2**30 for each in kept(arch, size, budget))
                what = f"{arch}, {size} px, budget {budget:g}"
                print(f"| {what} | {counted:.3f} | {partitioned:.3f} |", flush=True)


if __name__ == "__main__":
    main()
