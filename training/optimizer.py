"""The optimizers, including a fused version of Composer's DecoupledSGDW."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import composer.optim
import torch
from composer.core import State
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from errors import ConfigError
from networks.base import backbone_of
from training.schema import OptimizerConfig

# Matches the names of the parameters in a vision transformer's blocks (timm and transformers).
LAYER = re.compile(r"(?:(?:model\.)?blocks|layers|encoder\.layer)\.(\d+)\.(?!\d)")


class DecoupledSGDW(composer.optim.DecoupledSGDW):
    """SGD with decoupled weight decay that follows the learning-rate schedule.

    The arguments, arithmetic and state are the same as in Composer's class. So is the name, because
    a checkpoint contains the class name of its optimizer. However, this version takes a step in one
    fused operation. For the 340 parameters of ResNet-101, Composer's step launches about 1,300
    kernels. The GPU is mostly idle in the meantime, because the trainer has just waited for the
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
        """Take a step as Composer's function does, but also create any missing momentum buffers."""
        for is_new in (False, True):
            group = [i for i, old in enumerate(momentum_buffer_list) if (old is None) == is_new]
            if not group:
                continue
            weights = [params[i] for i in group]
            gradients = [laid_out_like(params[i], d_p_list[i]) for i in group]
            buffers = [momentum_buffer_list[i] for i in group]
            buffers = [
                None if buffer is None else laid_out_like(weight, buffer)
                for weight, buffer in zip(weights, buffers, strict=True)
            ]
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
    """Build a network's optimizer with as few parameter groups as the config allows.

    With `layer_decay`, layer l of a transformer with L layers gets the learning rate `lr *
    layer_decay ** (L + 1 - l)`, as in BEiT (https://arxiv.org/abs/2106.08254, appendix). Layer 0 is
    the patch embedding, and layer L + 1 is everything after the transformer's blocks. The weight
    decay is scaled by the same factor, because BEiT and MAE train with PyTorch's AdamW, which
    multiplies the weight decay by the learning rate. `head_lr_scale` changes only the learning
    rate.

    Raises:
        ConfigError: `head_lr_scale` is set but the network has no known backbone, or `layer_decay`
            is set but the backbone has no transformer layers.
    """
    backbone = backbone_of(network)
    if config.head_lr_scale != 1 and backbone is None:
        raise ConfigError(
            "optimizer.head_lr_scale: this network has no known backbone; remove the key"
        )
    in_backbone = set() if backbone is None else {*backbone.parameters()}
    layers = {}
    if config.layer_decay != 1:
        layers = layers_of(backbone)
        if not layers:
            raise ConfigError(
                "optimizer.layer_decay: the network has no transformer layers; remove the key"
            )
    norms = [module for module in network.modules() if "norm" in type(module).__name__.lower()]
    in_norms = {weight for module in norms for weight in module.parameters(recurse=False)}
    groups: dict[tuple[int, bool, bool], list[nn.Parameter]] = {}
    for name, weight in network.named_parameters():
        is_head = config.head_lr_scale != 1 and weight not in in_backbone
        kind = "norm" if weight in in_norms else "bias" if name.endswith("bias") else ""
        group = (-layers.get(weight, 0), is_head, kind in config.no_decay)
        groups.setdefault(group, []).append(weight)
    lr, decay = config.lr, config.weight_decay
    scales = {depth: config.layer_decay**-depth for depth, _, _ in groups}
    parameters: list[dict[str, Any]] = [
        {"params": weights}
        | ({"lr": lr * config.head_lr_scale} if is_head else {})
        | ({"lr": lr * scales[depth], "weight_decay": decay * scales[depth]} if depth else {})
        | ({"weight_decay": 0.0} if is_spared else {})
        for (depth, is_head, is_spared), weights in sorted(groups.items())
    ]
    if config.name == "adamw":
        beta1, beta2 = config.betas
        return composer.optim.DecoupledAdamW(parameters, lr, (beta1, beta2), weight_decay=decay)
    return DecoupledSGDW(parameters, lr, config.momentum, weight_decay=decay)


def layers_of(backbone: nn.Module | None) -> dict[nn.Parameter, int]:
    """Return each weight's distance in layers from the end of a vision transformer.

    The weights of the last block have distance 1. Weights after the last block are omitted.

    Args:
        backbone: Backbone of a network.

    Returns:
        The distance of each weight, or an empty dict if the backbone is not a plain transformer.
    """
    if backbone is None:
        return {}
    names = dict(backbone.named_parameters())
    matches = {name: LAYER.match(name) for name in names}
    numbers = [int(match[1]) for match in matches.values() if match]
    if not numbers:
        return {}
    count, is_before, layers = max(numbers) + 1, True, {}
    for name, match in matches.items():
        if match:
            is_before = False
            layers[names[name]] = count - int(match[1])
        # Parameters before the first block belong to the embeddings, which are farthest from the
        # output.
        elif is_before:
            layers[names[name]] = count + 1
    return layers


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return copies of an optimizer's parameter groups, without the parameters themselves."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def apply_settings(state: State, settings: list[dict[str, Any]], factor: float | None) -> None:
    """Replace the optimizer settings restored from a checkpoint with those in the config.

    Args:
        state: State of the trainer, after a checkpoint is loaded.
        settings: Result of `settings_of` before the checkpoint was loaded.
        factor: Learning-rate factor for the next step, or None to keep the checkpoint's learning
            rate.
    """
    (optimizer,) = state.optimizers
    for group, wanted in zip(optimizer.param_groups, settings, strict=True):
        group |= {name: value for name, value in wanted.items() if name != "lr"}
        group["initial_lr"] = wanted["lr"]
        if factor is not None:
            group["lr"] = wanted["lr"] * factor
    for scheduler in state.schedulers:
        scheduler.base_lrs = [wanted["lr"] for wanted in settings]


def _flat(tensors: Sequence[Tensor | None]) -> list[Any]:
    """View CPU tensors as vectors, so that the fused step does not copy channels-last tensors."""
    return [t if t is None or t.is_cuda else t.as_strided((t.numel(),), (1,)) for t in tensors]


def laid_out_like(weight: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in a weight's memory layout, copying it only if the layouts differ.

    The fused step processes memory in order, so all layouts must be equal. Momentum from a
    checkpoint that was saved without channels_last has a different layout.
    """
    if tensor.stride() == weight.stride():
        return tensor
    strides = zip(weight.shape, weight.stride(), tensor.stride(), strict=True)
    if all(size == 1 or ours == theirs for size, ours, theirs in strides):
        return tensor
    return torch.empty_like(weight).copy_(tensor)
