"""BatchNorm layers that share statistics between ranks and count batches in one operation.

torch's SyncBatchNorm does not run on CPUs, breaks compiled graphs at every layer, and makes the CPU
wait for the GPU three times per layer and pass. The layer in this module uses only ordinary
operations and one all-reduce.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d that leaves num_batches_tracked to `count_batches` and requires a momentum."""

    def forward(self, image: Tensor) -> Tensor:
        """Normalise a batch; in training, also update the running statistics."""
        if not self.training:
            return super().forward(image)
        assert self.momentum is not None
        return F.batch_norm(
            image,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            True,
            self.momentum,
            self.eps,
        )


class SyncBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm2d with statistics over the batches of all ranks in a process group.

    The results equal those of `torch.nn.SyncBatchNorm`. Affine parameters, momentum and running
    statistics are optional. Without a momentum, the running statistics are the mean over all
    batches. With a momentum, the layer leaves num_batches_tracked to `count_batches`. Ranks may
    have batches of different sizes, but must make the same forward and backward passes.

    Attributes:
        group_name: Name of the process group that shares the statistics. `share_statistics` sets
            this attribute when it converts existing layers. The layers keep their parameters and
            buffers.

    Shape:
        (N, C, H, W) -> (N, C, H, W), of the same data type. Computations are in fp32.
    """

    group_name: str

    def forward(self, image: Tensor) -> Tensor:
        """Normalise a batch; in training, also update the running statistics."""
        if not self.training:
            return super().forward(image)
        size = image.numel() // image.shape[1]
        variance, mean = torch.var_mean(image.float(), (0, 2, 3), correction=0)
        # Compute in fp64, because the difference of squares below would lose precision in fp32. The
        # tensors are small, so this is cheap.
        mean, variance = mean.double(), variance.double()
        own = torch.cat([mean.new_ones(1), mean, variance + mean.square()]) * size
        count, total, squares = all_reduce(own, self.group_name).split([1, *[len(mean)] * 2])
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self._track(mean, variance * (count / (count - 1)))
        scale = torch.rsqrt(variance.float() + self.eps)
        if self.weight is not None:
            scale = self.weight * scale
        result = (image.float() - mean.float().view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
        if self.bias is not None:
            result = result + self.bias.view(1, -1, 1, 1)
        return result.to(image.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, if there are any, with the statistics of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        share: float | Tensor | None = self.momentum
        if share is None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.to(self.running_mean.dtype)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(variance.to(self.running_var), share)


# Use a custom operator instead of an autograd.Function. torch.compile would turn a Function into a
# higher-order operator, which DDPOptimizer does not support.
@torch.library.custom_op("deeplab::all_reduce", mutates_args=())
def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    """Sum a tensor over the ranks of a group."""
    result = tensor.clone()
    # The cast is only for type checkers, because torch 2.13 declares a special type for this string
    # argument.
    group = torch.distributed.distributed_c10d._resolve_process_group(cast(Any, group_name))
    torch.distributed.all_reduce(result, group=group)
    return result


def _save(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return all_reduce(grad.contiguous(), ctx.group_name), None


all_reduce.register_fake(lambda tensor, group_name: torch.empty_like(tensor))
all_reduce.register_autograd(_backward, setup_context=_save)


def share_statistics(module: nn.Module, group: torch.distributed.ProcessGroup) -> None:
    """Turn every BatchNorm2d in a module into a `SyncBatchNorm2d`."""
    for layer in module.modules():
        if type(layer) in (nn.BatchNorm2d, BatchNorm2d):
            layer.__class__ = SyncBatchNorm2d
            cast(SyncBatchNorm2d, layer).group_name = group.group_name


def stop_counting(module: nn.Module) -> list[nn.BatchNorm2d]:
    """Stop BatchNorm layers from counting batches; return the layers for `count_batches`."""
    layers: list[nn.BatchNorm2d] = []
    for layer in module.modules():
        if not (isinstance(layer, nn.BatchNorm2d) and layer.track_running_stats and layer.momentum):
            continue
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = BatchNorm2d
        if isinstance(layer, BatchNorm2d | SyncBatchNorm2d):
            layers.append(layer)
    return layers


@torch.no_grad()
def count_batches(layers: list[nn.BatchNorm2d]) -> None:
    """Update the batch counters of all layers in one operation, instead of about a hundred."""
    counters = [layer.num_batches_tracked for layer in layers if layer.training]
    if counters:
        torch._foreach_add_(cast("list[Tensor]", counters), 1)


def share_in_node(network: nn.Module) -> None:
    """Share BatchNorm statistics within each node.

    Statistics are not shared across nodes, because the communication would take too long.
    """
    from composer.utils import dist  # predict.py starts faster without Composer.

    per_node = dist.get_local_world_size()
    if per_node == 1:
        return
    group, _ = torch.distributed.new_subgroups(per_node)
    share_statistics(network, cast(torch.distributed.ProcessGroup, group))
