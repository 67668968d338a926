"""The optimizer of a run, including a fused version of Composer's DecoupledSGDW."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import composer.optim
import torch
from composer.core import State
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from errors import ConfigError
from networks.base import backbone_of
from training.schema import OptimizerConfig


class DecoupledSGDW(composer.optim.DecoupledSGDW):
    """SGD whose weight decay is a fraction per step, scheduled with the learning rate.

    Arguments, arithmetic and state are Composer's. The name is Composer's too, because a checkpoint
    records the name of its optimizer. Composer's step launches about 1,300 kernels for the 340
    parameters of ResNet-101. The GPU is idle meanwhile, because the trainer has just waited for the
    loss.
    """

    @staticmethod
    def sgdw(
        params: list[Tensor],
        d_p_list: list[Tensor],
        momentum_buffer_list: list[Tensor | None],
        *,
        weight_decay: float,
        momentum: float,
        lr: float,
        initial_lr: float,
        dampening: float,
        nesterov: bool,
    ) -> None:
        """Take a step, like Composer's function; fill a list of buffers that is all None."""
        groups = (
            [i for i, buffer in enumerate(momentum_buffer_list) if (buffer is None) == is_new]
            for is_new in (False, True)
        )
        for group in filter(None, groups):
            weights = [params[i] for i in group]
            gradients = [laid_out_like(params[i], d_p_list[i]) for i in group]
            buffers = [laid_out_like(params[i], momentum_buffer_list[i]) for i in group]
            if weight_decay:
                decay = weight_decay * (lr / initial_lr if initial_lr else 1.0)
                torch._foreach_mul_(weights, 1 - decay)
            flat_buffers = _flat(buffers)
            sgd(
                _flat(weights),
                _flat(gradients),
                flat_buffers,
                fused=True,
                weight_decay=0.0,
                momentum=momentum,
                lr=lr,
                dampening=dampening,
                nesterov=nesterov,
                maximize=False,
            )
            for i, buffer, flat in zip(group, buffers, flat_buffers, strict=True):
                if buffer is None and flat is not None:
                    buffer = flat.as_strided(params[i].shape, params[i].stride())
                momentum_buffer_list[i] = buffer


def build_optimizer(config: OptimizerConfig, network: nn.Module) -> Optimizer:
    """Build the optimizer of a network, with as few parameter groups as the config allows.

    Raises:
        ConfigError: `head_lr_scale` is set, but the network has no known backbone.
    """
    backbone = backbone_of(network)
    if config.head_lr_scale != 1 and backbone is None:
        raise ConfigError(
            "optimizer.head_lr_scale: this network has no known backbone; leave out the key"
        )
    in_backbone = set() if backbone is None else {*backbone.parameters()}
    norms = [module for module in network.modules() if "norm" in type(module).__name__.lower()]
    in_norms = {weight for module in norms for weight in module.parameters(recurse=False)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        is_head = config.head_lr_scale != 1 and weight not in in_backbone
        kind = "norm" if weight in in_norms else "bias" if name.endswith("bias") else ""
        groups.setdefault((is_head, kind in config.no_decay), []).append(weight)
    parameters: list[dict[str, Any]] = [
        {"params": weights}
        | ({"lr": config.lr * config.head_lr_scale} if is_head else {})
        | ({"weight_decay": 0.0} if is_spared else {})
        for (is_head, is_spared), weights in sorted(groups.items())
    ]
    lr, decay = config.lr, config.weight_decay
    if config.name == "adamw":
        beta1, beta2 = config.betas
        return composer.optim.DecoupledAdamW(parameters, lr, (beta1, beta2), weight_decay=decay)
    return DecoupledSGDW(parameters, lr, config.momentum, weight_decay=decay)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return a copy of each parameter group without its parameters."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def apply_settings(state: State, settings: list[dict[str, Any]], factor: float | None) -> None:
    """Give a loaded optimizer the settings of the config instead of those of the checkpoint.

    Args:
        state: State of the trainer, after a checkpoint is loaded.
        settings: Result of `settings_of` from before the checkpoint was loaded.
        factor: Factor of the learning rate for the next step. None keeps the learning rate of the
            checkpoint, bit for bit.
    """
    (optimizer,) = state.optimizers
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group |= {name: value for name, value in wanted.items() if name != "lr"}
        group["initial_lr"] = wanted["lr"]
        if factor is not None:
            group["lr"] = wanted["lr"] * factor
    for scheduler in state.schedulers:
        scheduler.base_lrs = [wanted["lr"] for wanted in settings]


@overload
def _flat(tensors: list[Tensor]) -> list[Tensor]: ...


@overload
def _flat(tensors: list[Tensor | None]) -> list[Tensor | None]: ...


def _flat(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """View CPU tensors as vectors: the fused CPU step would copy channels-last tensors twice."""
    return [t if t is None or t.is_cuda else t.as_strided((t.numel(),), (1,)) for t in tensors]


@overload
def laid_out_like(weight: Tensor, tensor: Tensor) -> Tensor: ...


@overload
def laid_out_like(weight: Tensor, tensor: Tensor | None) -> Tensor | None: ...


def laid_out_like(weight: Tensor, tensor: Tensor | None) -> Tensor | None:
    """Return the tensor in the memory layout of the weight; copy it only if the layouts differ.

    The fused step walks through memory in order. A checkpoint of a run without channels_last has
    momentum in another layout.
    """
    if tensor is None or tensor.stride() == weight.stride():
        return tensor
    strides = zip(weight.shape, weight.stride(), tensor.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in strides):
        return tensor
    return torch.empty_like(weight).copy_(tensor)
